import json
import shutil
from dataclasses import replace

import pytest
from made_archives import picture, terra_incognita

from domainbed_hp.datasets.download.check import check
from domainbed_hp.datasets.download.download import download
from domainbed_hp.datasets.download.unpack import unpack
from domainbed_hp.datasets.folder import read_folder
from domainbed_hp.datasets.terra_incognita import CLASSES, TERRA_INCOGNITA, sort_images
from domainbed_hp.registry import UsageError


@pytest.fixture
def shelf(tmp_path):
    """A folder for archives."""
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def test_terra_incognita_image_by_image(shelf, tmp_path):
    spec = terra_incognita(shelf, "")
    download(spec, tmp_path, archives={path.name: path for path in shelf.iterdir()})
    root = tmp_path / "terra_incognita"
    assert sorted(path.name for path in root.glob("location_100/bird/*")) == ["i0.jpg", "i1.jpg"]
    assert (root / "location_100" / "cat" / "i0.jpg").read_bytes() == picture("i0.jpg")
    assert (root / "location_100" / "bird" / "i0.jpg").read_bytes() == picture("i0.jpg")
    assert sorted(path.name for path in root.iterdir()) == sorted(spec.domain_folders)
    assert not list(root.rglob("i80.jpg")) and not list(root.rglob("i81.jpg"))  # elsewhere, and a deer


def test_terra_incognita_keeps_four_locations_and_ten_classes(shelf, tmp_path):
    terra_incognita(shelf, "")
    folder = tmp_path / "folder"
    for archive in shelf.iterdir():
        unpack(archive, folder)
    sort_images(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(TERRA_INCOGNITA.domain_folders)
    assert {path.name for path in folder.glob("*/*")} == set(CLASSES)


def test_terra_incognita_without_its_annotations_says_what_there_was(tmp_path):
    (tmp_path / "eccv_18_all_images_sm").mkdir()
    notes = tmp_path / "eccv_18_annotation_files"
    notes.mkdir()
    (notes / "train_annotations.json").write_text("{}")
    with pytest.raises(UsageError, match="lack cis_test_annotations.json, .*They hold .*/train_annotations.json"):
        sort_images(tmp_path)
    for name in ("cis_test", "cis_val", "trans_test", "trans_val"):
        (notes / f"{name}_annotations.json").write_text("{}")
    with pytest.raises(UsageError, match="cis_test_annotations.json is not in COCO's annotation format"):
        sort_images(tmp_path)
    shutil.rmtree(tmp_path / "eccv_18_all_images_sm")
    with pytest.raises(UsageError, match="lack eccv_18_all_images_sm"):
        sort_images(tmp_path)


def test_terra_incognita_annotations_lead_nowhere_else(tmp_path):
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(b"precious")
    folder = tmp_path / "folder"
    notes = folder / "eccv_18_annotation_files"
    notes.mkdir(parents=True)
    (folder / "eccv_18_all_images_sm").mkdir()
    for name in ("cis_test", "cis_val", "train", "trans_test", "trans_val"):
        content = {
            "images": [{"id": 1, "file_name": "../../victim.jpg", "location": 38}],
            "annotations": [{"image_id": 1, "category_id": 1}],
            "categories": [{"id": 1, "name": "bird"}],
        }
        (notes / f"{name}_annotations.json").write_text(json.dumps(content))
    sort_images(folder)
    assert victim.read_bytes() == b"precious"


def test_both_builds_of_terra_incognita_are_known(shelf, tmp_path, capsys):
    builds = {name: sum(counts) for name, counts in TERRA_INCOGNITA.builds.items()}
    assert builds == {"of 2021": 24_330, "of 2020": 24_788}
    spec = terra_incognita(shelf, "")
    spec = replace(spec, image_counts=(1, 1, 1, 1), other_builds={"of 2020": spec.image_counts})
    download(spec, tmp_path, archives={path.name: path for path in shelf.iterdir()})
    assert "(the build of 2020)" in capsys.readouterr().out
    download(spec, tmp_path)
    assert "(the build of 2020), not changed" in capsys.readouterr().out
    report = check(spec, tmp_path, 0)
    assert report.ok and report.build == "of 2020" and "of the build of 2020" in report.to_text()
    assert report.expected == {domain: sum(per.values()) for domain, per in report.counts.items()}
    spec = replace(spec, image_counts=spec.other_builds["of 2020"], build_name="of 2021", other_builds={})
    assert check(spec, tmp_path, 0).build == "of 2021"


def test_both_builds_are_named_where_there_is_another(shelf, tmp_path, capsys):
    spec = replace(
        terra_incognita(shelf, ""), image_counts=(1,) * 4, build_name="of 2021", other_builds={"of 2020": (2,) * 4}
    )
    both = (
        "expected (1, 1, 1, 1) (the build of 2021) or (2, 2, 2, 2) (the build of 2020); published results are of one of"
    )
    archives = {path.name: path for path in shelf.iterdir()}
    download(spec, tmp_path, archives=archives, accept_counts=True)
    assert both in capsys.readouterr().err
    read_folder(spec, tmp_path)
    assert both in capsys.readouterr().err
    report = check(spec, tmp_path, 0)
    assert report.build is None and set(report.expected.values()) == {1}
