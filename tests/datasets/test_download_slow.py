import filecmp
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from loopback import QUOTA, Loopback, Reply, be_drive
from made_archives import pets, sha256

from domainbed_hp.datasets.download import fetch
from domainbed_hp.datasets.download.check import check
from domainbed_hp.datasets.download.download import download
from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.registry import UsageError

pytestmark = pytest.mark.slow

MB = 10**6
FAULTS = {
    "none": [],
    "dropped": [Reply(stop_after=50 * MB), Reply(stop_after=MB), Reply(stop_after=0)],
    "429 and 503": [Reply(status=429, headers={"Retry-After": "1"}), Reply(status=503), Reply(stop_after=9 * MB)],
    "truncated": [Reply(stop_after=150 * MB, ranges=False), Reply(stop_after=10 * MB, ranges=False)],
    "changed between parts": [Reply(stop_after=20 * MB), Reply(tag='"2"')],
    "silent": [Reply(hang=True)],
}
UNCLEAN = {
    "a lie about the digest": ([Reply()], "0" * 64, "does not match the known hash"),
    "other bytes": ([Reply(body=b"PK\3\4" + bytes(10 * MB))], "", "damaged"),
    "half, and says so": ([Reply(announce=100 * MB)], "", "damaged"),
    "a page": ([QUOTA], "", "Quota exceeded"),
}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.05)
    monkeypatch.setattr(fetch, "TIMEOUT_S", 3)


@pytest.fixture(scope="module")
def kfold(shared_data, tmp_path_factory):
    """All of PACS as its authors pack it."""
    path = tmp_path_factory.mktemp("kfold") / "PACS.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((shared_data / "PACS").rglob("*")):
            archive.write(file, "kfold" / file.relative_to(shared_data / "PACS"))
    yield path
    path.unlink()


@pytest.fixture
def server(kfold):
    with Loopback() as server:
        server.files["/PACS.zip"] = kfold
        yield server


def served(server, digest=""):
    return replace(PACS, archives=(replace(PACS.archives[0], sources=(f"{server.url}/PACS.zip",), sha256=digest),))


def same(one, other):
    """Return True if two folders hold the same files, byte for byte."""
    compared = filecmp.dircmp(one, other, ignore=[])
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    _, differing, errors = filecmp.cmpfiles(one, other, compared.common_files, shallow=False)
    return not differing and not errors and all(same(one / name, other / name) for name in compared.common_dirs)


def assert_arrived(data, shared_data, kfold):
    assert sorted(path.name for path in data.iterdir()) == ["PACS", "digests.txt"]
    assert (data / "digests.txt").read_text() == f"{sha256(kfold)}  PACS.zip\n"
    assert same(data / "PACS", shared_data / "PACS")
    shutil.rmtree(data)


@pytest.mark.parametrize("fault", FAULTS)
def test_all_of_pacs_through(fault, server, shared_data, kfold, tmp_path):
    server.script["/PACS.zip"] = list(FAULTS[fault])
    download(served(server), tmp_path / "data")
    assert_arrived(tmp_path / "data", shared_data, kfold)


@pytest.mark.parametrize("fault", UNCLEAN)
def test_pacs_fails_cleanly_on(fault, server, tmp_path):
    server.script["/PACS.zip"], digest, said = UNCLEAN[fault]
    with pytest.raises(UsageError, match=said):
        download(served(server, digest), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_all_of_pacs_from_drive(server, shared_data, kfold, tmp_path, monkeypatch):
    be_drive(server, kfold, monkeypatch)
    server.script["/uc"] = [QUOTA]
    drive = replace(PACS, archives=(replace(PACS.archives[0], sources=PACS.archives[0].sources[:1]),))
    with pytest.raises(UsageError, match="Too many users have viewed"):
        download(drive, tmp_path / "data")
    server.script["/download"] = [Reply(body=QUOTA.body, headers={"Content-Type": "text/html"})]
    with pytest.raises(UsageError, match="instead of PACS.zip, titled 'Google Drive - Quota exceeded'"):
        download(drive, tmp_path / "data")
    server.script["/download"] = [Reply(stop_after=30 * MB)]
    server.requests.clear()
    download(drive, tmp_path / "data")
    assert server.requests[-1] == ("/download?id=ID&confirm=t", f"bytes={30 * MB // 2**19 * 2**19}-")
    assert_arrived(tmp_path / "data", shared_data, kfold)


def test_all_of_pacs_is_checked(shared_data):
    report = check(PACS, shared_data)
    assert report.ok and report.build == "" and not report.undecodable
    assert not report.duplicates


COMMAND = """
import sys
from domainbed_hp.registry import DATASETS
from domainbed_hp.scripts import download, run
DATASETS["Pets"] = "served:SPEC"
sys.exit(run(download.main))
"""


def test_killed_at_any_moment_the_next_run_ends_right(tmp_path):
    with Loopback() as server:
        shelf = tmp_path / "shelf"
        shelf.mkdir()
        spec = pets(shelf, server.url, images=300)
        server.files["/pets.zip"] = shelf / "pets.zip"
        with zipfile.ZipFile(shelf / "pets.zip") as archive:
            archive.extractall(shelf)
        (tmp_path / "served.py").write_text(
            "from domainbed_hp.datasets.spec import Archive, DatasetSpec\n" + f"SPEC = {spec!r}\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}

        def start(data):
            """The command, up to the moment at which it begins to do something."""
            args = [sys.executable, "-u", "-c", COMMAND, "--data_dir", str(data), "--datasets", "Pets"]
            process = subprocess.Popen(args, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert process.stdout and process.stdout.readline() == b"Pets\n"
            return process

        server.bytes_per_s = 2 * shelf.joinpath("pets.zip").stat().st_size
        process, begin = start(tmp_path / "whole"), time.monotonic()
        assert process.wait() == 0
        duration_s = time.monotonic() - begin

        moments: Counter[str] = Counter()
        rng = random.Random(0)
        for trial in range(20):
            data = tmp_path / f"data{trial}"
            server.bytes_per_s = 2 * shelf.joinpath("pets.zip").stat().st_size
            process = start(data)
            time.sleep((trial + rng.random()) / 20 * duration_s)
            process.kill()
            process.wait()
            left = {path.name for path in data.iterdir()}
            moments["ended" if "pets" in left else "unpack" if ".pets.partial" in left else "download"] += 1
            server.bytes_per_s = 0
            download(spec, data)
            assert sorted(path.name for path in data.iterdir()) == ["digests.txt", "pets"], moments
            assert (data / "digests.txt").read_text() == f"{sha256(shelf / 'pets.zip')}  pets.zip\n"
            assert same(data / "pets", shelf / "Pets-1.0")
            shutil.rmtree(data)
        assert moments["download"] >= 2 and moments["unpack"] >= 2, moments
        print(moments, f"{duration_s:.2f} s")
