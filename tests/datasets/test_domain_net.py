import shutil
import zipfile
from dataclasses import replace

import pytest
from made_archives import domain_net, sha256

from domainbed_hp.datasets.domain_net import DOMAIN_NET, DUPLICATES
from domainbed_hp.datasets.download.download import download
from domainbed_hp.registry import UsageError


@pytest.fixture
def shelf(tmp_path):
    """A folder for archives."""
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def test_domain_nets_duplicates_go_and_its_list_leads_nowhere_else(shelf, tmp_path, capsys):
    spec, data = domain_net(shelf, ""), tmp_path / "data"
    archives = {path.name: path for path in shelf.iterdir()}
    listed = (shelf / DUPLICATES).read_text().split()
    with zipfile.ZipFile(shelf / "clipart.zip") as archive:
        assert listed[0] in archive.namelist()
    download(spec, data, archives=archives)
    assert not [line for line in listed if (data / "domain_net" / line).exists()]
    assert not list((data / "domain_net").glob("*.txt")) and "of the listed duplicates" not in capsys.readouterr().out

    shutil.rmtree(data)
    (shelf / DUPLICATES).write_text("clipart/zebra/none.jpg\n" + "\n".join(listed))
    spec = replace(spec, archives=(*spec.archives[:-1], replace(spec.archives[-1], sha256=sha256(shelf / DUPLICATES))))
    download(spec, data, archives=archives)
    assert "1 of the listed duplicates were not in the archives" in capsys.readouterr().out

    shutil.rmtree(data)
    data.mkdir()
    (data / "victim.jpg").write_text("precious")
    (shelf / DUPLICATES).write_text("../victim.jpg\n")
    spec = replace(spec, archives=(*spec.archives[:-1], replace(spec.archives[-1], sha256=sha256(shelf / DUPLICATES))))
    with pytest.raises(UsageError, match="'../victim.jpg' leaves the folder"):
        download(spec, data, archives=archives)
    assert (data / "victim.jpg").read_text() == "precious"


def test_the_list_of_duplicates_is_the_published_one(shared_data):
    listed = DOMAIN_NET.archives[-1]
    assert sha256(shared_data / listed.name) == listed.sha256
