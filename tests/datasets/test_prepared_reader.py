import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pets import SPEC, draw, make_pets, preprocess

from domainbed_hp.datasets.folder import read_folder
from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.open import open_dataset
from domainbed_hp.datasets.prepared.prepare import prepare
from domainbed_hp.datasets.prepared.reader import open_prepared
from domainbed_hp.registry import DATASETS, UsageError, load

FOLDER = Path("prepared") / "pets-20-crop-bicubic"


@pytest.fixture
def pets(tmp_path):
    """Prepared at 20 pixels."""
    prepare(SPEC, make_pets(tmp_path), 20)
    return tmp_path


def counts(dataset):
    return tuple(map(len, dataset.environments))


def same(spec, data_dir, how, step=1):
    """Check that prepared views equal decoded ones. Return the number of images compared."""
    prepared = open_prepared(spec, data_dir, how)
    names, folders = read_folder(spec, data_dir)
    assert prepared.class_names == names and counts(prepared) == tuple(map(len, folders))
    compared = 0
    for ours, images in zip(prepared.environments, folders, strict=True):
        theirs = DecodedViews(images, how)
        assert ours.labels.dtype == np.int64 and np.array_equal(ours.labels, theirs.labels)
        assert len(ours) == len(theirs)
        for i in range(0, len(ours), step):
            for a, b in (
                (ours.load_training_view(i), theirs.load_training_view(i)),
                (ours.load_evaluation_view(i), theirs.load_evaluation_view(i)),
            ):
                assert a.dtype == np.uint8 and np.array_equal(a, b)
            compared += 1
    return compared


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [8, 20, 70])
def test_prepared_equals_unprepared_bit_for_bit(tmp_path, size, resize, interpolation):
    make_pets(tmp_path)
    prepare(SPEC, tmp_path, size, resize, interpolation)
    assert same(SPEC, tmp_path, preprocess(size, resize, interpolation)) == 13


def test_compressed_views_to_score_are_equal_and_those_to_train_on_near(tmp_path):
    prepare(SPEC, make_pets(tmp_path), 20, encoding="compressed")
    prepared = open_prepared(SPEC, tmp_path, preprocess())
    assert prepared.source == "prepared, compressed"
    for ours, images in zip(prepared.environments, read_folder(SPEC, tmp_path)[1], strict=True):
        theirs = DecodedViews(images, preprocess())
        for i in range(len(images)):
            assert np.array_equal(ours.load_evaluation_view(i), theirs.load_evaluation_view(i))
            a, b = ours.load_training_view(i), theirs.load_training_view(i)
            assert a.dtype == np.uint8 and a.shape == b.shape
            # A single black and white pixel grid is what JPEG likes least.
            assert np.abs(a.astype(int) - b).mean() < (12 if "a.png" in images.paths[i] else 4)


def test_by_any_number_of_threads(pets):
    views = open_prepared(SPEC, pets, preprocess()).environments[0]
    once = [(views.load_training_view(i), views.load_evaluation_view(i)) for i in range(9)]
    order = np.random.default_rng(0).integers(0, 9, 2000).tolist()
    with ThreadPoolExecutor(4) as pool:
        pairs = list(pool.map(lambda i: (views.load_training_view(i), views.load_evaluation_view(i)), order))
    for i, pair in zip(order, pairs, strict=True):
        assert all(map(np.array_equal, pair, once[i]))


def test_a_data_set_opens_prepared(pets, capsys):
    dataset = open_dataset(SPEC, pets, preprocess())
    assert dataset.source == "prepared, raw" and dataset.class_names == ("cat", "dog")
    assert [len(environment) for environment in dataset.environments] == [9, 4]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", [preprocess(24), preprocess(20, "squash"), preprocess(20, "crop", "bilinear")])
def test_other_pixels_have_none(pets, other, capsys):
    assert open_prepared(SPEC, pets, other) is None
    assert capsys.readouterr().err == ""


def add(root):
    draw(99, (30, 30)).save(root / "my book/cat/0.png")
    return "my book/cat/0.png is new"


def add_last(root):
    draw(99, (30, 30)).save(root / "my book/dog/zz.png")
    return "my book/dog/zz.png is new"


def remove_last(root):
    (root / "my book/dog/é.png").unlink()
    return "my book/dog/é.png is gone"


def touch(root):
    os.utime(root / "my book/dog/b.tiff", ns=(0, 5))
    return "my book/dog/b.tiff has changed"


def grow(root):
    path = root / "my book/dog/b.tiff"
    time_ns = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time_ns, time_ns))
    return "my book/dog/b.tiff has changed"


def link_to_nowhere(root):
    (root / "my book/dog/b.tiff").unlink()
    (root / "my book/dog/b.tiff").symlink_to(root / "nowhere")
    return "my book/dog/b.tiff has changed"


def three(root):
    draw(99, (30, 30)).save(root / "art/dog/zz.png")
    add(root)
    touch(root)
    return "art/dog/zz.png is new, and 2 more differ"


def rename(root):
    (root / "my book/cat/a.png").rename(root / "my book/cat/c.png")
    return "my book/cat/a.png is gone, and 1 more differ"


@pytest.mark.parametrize("change", [add, add_last, remove_last, touch, grow, link_to_nowhere, three, rename])
def test_out_of_date_is_said_and_not_used(pets, change, capsys):
    expected = change(pets / "pets")
    assert open_prepared(SPEC, pets, preprocess()) is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{pets / FOLDER} is out of date and not used: {pets / 'pets'}/{expected}. Renew it: " in err
    command = "python -m domainbed_hp.scripts.prepare --data_dir {} --dataset Pets --image_size 20 --resize crop "
    assert err.endswith(command.format(pets) + "--interpolation bicubic\n")


def test_restored_size_and_time_go_unnoticed(pets, capsys):
    path = pets / "pets/art/dog/tiny.bmp"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-4] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_prepared(SPEC, pets, preprocess()) is not None
    before = (pets / FOLDER / "art.bin").read_bytes()
    prepare(SPEC, pets, 20)
    assert (pets / FOLDER / "art.bin").read_bytes() == before


def test_incomplete(pets, capsys):
    (pets / FOLDER / "art.csv").rename(pets / FOLDER / "art.csv.partial")
    assert open_prepared(SPEC, pets, preprocess()) is None
    assert "not used: art not complete. Renew it: python" in capsys.readouterr().err


def test_another_format(pets, capsys):
    about = pets / FOLDER / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 2}))
    assert open_prepared(SPEC, pets, preprocess()) is None
    about.write_text("{")
    assert open_prepared(SPEC, pets, preprocess()) is None
    assert capsys.readouterr().err.count("not used: another version of the package wrote it. Renew it: python") == 2


def test_without_the_files(pets, capsys):
    expected = [
        view.copy()
        for view in map(open_prepared(SPEC, pets, preprocess()).environments[0].load_training_view, range(9))
    ]
    shutil.rmtree(pets / "pets")
    prepared = open_prepared(SPEC, pets, preprocess())
    assert all(np.array_equal(prepared.environments[0].load_training_view(i), expected[i]) for i in range(9))
    assert capsys.readouterr().err == ""
    for other in (replace(SPEC, class_names=("cat", "fox")), replace(SPEC, class_names=None, num_classes=3)):
        assert open_prepared(other, pets, preprocess()) is None
        assert "not used: it has other environments or classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["art.bin", "art.csv"])
@pytest.mark.parametrize("share", [0, 0.7])
@pytest.mark.parametrize("files", [True, False])
def test_half_a_copy_is_refused(pets, name, share, files, capsys):
    if not files:
        shutil.rmtree(pets / "pets")
    os.truncate(pets / FOLDER / name, int((pets / FOLDER / name).stat().st_size * share))
    if files and name == "art.csv":
        assert open_prepared(SPEC, pets, preprocess()) is None
        assert "is new" in capsys.readouterr().err
        return
    with pytest.raises(
        UsageError, match=r"art.bin does not fit its index: it has .* bytes, expected .*, or run: python"
    ):
        open_prepared(SPEC, pets, preprocess())


def test_missing_data_are_named(pets):
    (pets / FOLDER / "art.bin").unlink()
    with pytest.raises(UsageError, match=r"art.bin does not fit its index: No such file or directory"):
        open_prepared(SPEC, pets, preprocess())


def test_data_that_shrink_while_they_are_read_are_named(pets):
    views = open_prepared(SPEC, pets, preprocess()).environments[0]
    os.truncate(pets / FOLDER / "art.bin", 100)
    with pytest.raises(UsageError, match=r"art.bin does not fit its index: it ends at byte 100, expected"):
        views.load_training_view(0)


def test_what_was_left_out_is_said(tmp_path, capsys):
    make_pets(tmp_path)
    (tmp_path / "pets/art/dog/a.png").write_text("no image")
    prepare(SPEC, tmp_path, 20, on_error="skip")
    capsys.readouterr()
    prepared = open_prepared(SPEC, tmp_path, preprocess())
    assert counts(prepared) == (8, 4)
    err = capsys.readouterr().err
    assert "leaves out 1 images with errors" in err
    assert "(8, 4) images per environment, expected (9, 4)" in err and err.count("\n") == 2


def test_other_builds_are_named(pets, capsys):
    spec = replace(SPEC, image_counts=(1, 2), other_builds={"of 2020": (9, 4)})
    assert open_prepared(spec, pets, preprocess()) is not None
    assert capsys.readouterr().err == f"Pets in {pets / FOLDER} is the build of 2020\n"


def test_wrong_folders_are_refused_as_without(pets):
    (pets / "pets/art/cow").mkdir()
    with pytest.raises(UsageError, match="unexpected class folder of .*art: cow"):
        open_prepared(SPEC, pets, preprocess())


PACS = load(DATASETS, "dataset", "PACS")


def link_pacs(shared_data, data_dir, per_class):
    for domain in PACS.domain_folders:
        for name in PACS.class_names:
            (data_dir / "PACS" / domain / name).mkdir(parents=True)
            for path in sorted((shared_data / "PACS" / domain / name).iterdir())[:per_class]:
                (data_dir / "PACS" / domain / name / path.name).symlink_to(path)
    return replace(PACS, image_counts=())


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_pacs(shared_data, tmp_path, resize):
    spec = link_pacs(shared_data, tmp_path, 5)
    prepare(spec, tmp_path, 224, resize)
    assert same(spec, tmp_path, preprocess(224, resize)) == 4 * 7 * 5


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_all_of_pacs(shared_data, tmp_path, resize, capsys):
    (tmp_path / "PACS").symlink_to(shared_data / "PACS")
    prepare(PACS, tmp_path, 64, resize, num_workers=2)
    assert same(PACS, tmp_path, preprocess(64, resize)) == 9991


@pytest.mark.parametrize("size", [64, 224])
def test_pacs_compressed(shared_data, tmp_path, size):
    spec = link_pacs(shared_data, tmp_path, 5)
    prepare(spec, tmp_path, size, encoding="compressed")
    prepared = open_prepared(spec, tmp_path, preprocess(size))
    differences = []
    for ours, images in zip(prepared.environments, read_folder(spec, tmp_path)[1], strict=True):
        theirs = DecodedViews(images, preprocess(size))
        assert all(
            np.array_equal(ours.load_evaluation_view(i), theirs.load_evaluation_view(i)) for i in range(len(ours))
        )
        differences += [
            np.abs(ours.load_training_view(i).astype(int) - theirs.load_training_view(i)).mean()
            for i in range(len(ours))
        ]
    used = sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) / len(differences)
    print(f"{size} px: training views {np.mean(differences):.2f} of 255 off, {used:.0f} bytes an image in all")
    assert np.mean(differences) < 2
