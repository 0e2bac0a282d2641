import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from pets import SPEC as PETS
from PIL import Image
from torchvision.datasets import ImageFolder

from domainbed_hp.datasets.folder import read_folder
from domainbed_hp.datasets.open import find_spec, open_dataset
from domainbed_hp.datasets.spec import ArrayImages, DatasetSpec
from domainbed_hp.datasets.splits import split_environments
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import DATASETS, UsageError, load

PIXELS = Preprocess(8, "crop", "bicubic")
SPEC = replace(PETS, domain_folders=("art", "book"), image_counts=(7, 4))
FILES = ("art/cat/2.png", "art/cat/10.PNG", "art/cat/in/1.jpg", "art/cat/in-2/1.png", "art/cat/in/deep/1.png")
FILES += ("art/dog/a.png", "art/dog/b.webp")
FILES += ("book/cat/a.png", "book/cat/b.png", "book/dog/a.png", "book/dog/b.bmp")


@pytest.fixture
def pets(tmp_path):
    """A folder data set as SPEC describes it."""
    for i, name in enumerate(FILES):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if i % 2 else "RGB", (8, 6), 20 * i).save(path)
    return tmp_path


def test_files_and_labels_in_image_folders_order(pets):
    class_names, environments = read_folder(SPEC, pets)
    assert class_names == ("cat", "dog")
    for images, domain in zip(environments, SPEC.domain_folders, strict=True):
        theirs = ImageFolder(pets / "pets" / domain)
        assert images.paths == [path for path, _ in theirs.samples]
        assert images.labels.tolist() == theirs.targets
        assert images.labels.dtype == np.int64
        assert {(images[i].mode, images[i].size) for i in range(len(images))} == {("RGB", (8, 6))}
    assert [len(images) for images in environments] == [7, 4]
    dataset = open_dataset(SPEC, pets, PIXELS)
    assert dataset.class_names == ("cat", "dog") and dataset.source == "image files"
    assert [len(views) for views in dataset.environments] == [7, 4]
    assert dataset.environments[1].load_evaluation_view(3).shape == (3, 8, 8)


def test_litter_is_ignored(pets):
    for name in (".git", "__MACOSX", "art/.cache", "art/cat/.thumbs"):
        (pets / "pets" / name).mkdir()
    for name in (".DS_Store", "art/Thumbs.db", "art/cat/notes.txt", "art/dog/._a.png", "art/cat/.thumbs/x.png"):
        (pets / "pets" / name).write_text("litter")
    assert [len(images) for images in open_dataset(SPEC, pets, PIXELS).environments] == [7, 4]


def test_everything_wrong_is_listed_at_once(pets):
    root = pets / "pets"
    (root / "raw").mkdir()
    (root / "art" / "cow").mkdir()
    for path in (root / "art" / "dog").iterdir():
        path.unlink()
    for path in (root / "book" / "cat").iterdir():
        path.unlink()
    (root / "book" / "cat").rmdir()
    (root / "book" / "dog" / "a.png").write_text("no image")
    with pytest.raises(UsageError) as caught:
        open_dataset(SPEC, pets, PIXELS)
    message = str(caught.value)
    assert f"unexpected environment folder of {root}: raw" in message
    assert f"unexpected class folder of {root / 'art'}: cow" in message
    assert f"no images in {root / 'art' / 'dog'}" in message
    assert f"missing class folder of {root / 'book'}: cat" in message
    assert f"not an image: {root / 'book' / 'dog' / 'a.png'}" in message
    assert message.count("\n  ") == 5
    assert "download again" in message


def test_a_long_list_of_problems_is_cut(pets):
    for i in range(14):
        (pets / "pets" / f"raw{i:02}").mkdir()
    with pytest.raises(UsageError, match=r"raw09\n  \.\.\. and 4 more"):
        open_dataset(SPEC, pets, PIXELS)


def test_missing_folders(pets):
    with pytest.raises(UsageError, match="--data_dir is the folder that holds pets/, which holds art, book"):
        open_dataset(SPEC, pets / "pets", PIXELS)
    with pytest.raises(UsageError, match="pass --data_dir"):
        open_dataset(SPEC, None, PIXELS)
    (pets / "pets" / "book").rename(pets / "pets" / "novel")
    with pytest.raises(UsageError, match="missing environment folder of .*: book\n.*unexpected .*: novel"):
        open_dataset(SPEC, pets, PIXELS)


def test_class_names_from_the_folders_must_agree(pets):
    spec = DatasetSpec("Pets", ("A", "B"), 2, folder="pets", domain_folders=("art", "book"))
    assert open_dataset(spec, pets, PIXELS).class_names == ("cat", "dog")
    (pets / "pets" / "art" / "cat").rename(pets / "pets" / "art" / "kitten")
    with pytest.raises(UsageError) as caught:
        open_dataset(spec, pets, PIXELS)
    for text in ("got 3 classes in all, expected 2", "art: cat", "book: kitten"):
        assert text in str(caught.value)


def test_another_count_is_a_warning_on_stderr(pets, capsys):
    open_dataset(SPEC, pets, PIXELS)
    assert capsys.readouterr().err == ""
    (pets / "pets" / "art" / "cat" / "2.png").unlink()
    open_dataset(SPEC, pets, PIXELS)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "(6, 4) images per environment, expected (7, 4)" in err


def test_a_damaged_image_names_its_path(pets):
    images = read_folder(SPEC, pets)[1][1]
    path = images.paths[0]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    with open(path, "rb+") as file:
        file.truncate(3000)
    assert len(open_dataset(SPEC, pets, PIXELS).environments[1]) == 4  # its header is fine
    with pytest.raises(UsageError, match="book/cat/a.png: cannot decode"):
        images[0]
    with pytest.raises(UsageError, match="book/cat/a.png: cannot decode"):
        open_dataset(SPEC, pets, PIXELS).environments[1].load_training_view(0)


def test_an_image_too_large_to_be_one_names_its_path(pets, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UsageError, match=r"cannot read .*book/cat/a.png: Image size \(48 pixels\) exceeds limit"):
        open_dataset(SPEC, pets, PIXELS)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_folder_of_ones_own_needs_no_code(pets, absolute):
    name, data_dir = (f"folder:{pets / 'pets'}", None) if absolute else ("folder:pets", pets)
    spec = find_spec(name, data_dir)
    assert spec.name == name and spec.environments == ("art", "book") and spec.class_names == ("cat", "dog")
    dataset = open_dataset(spec, data_dir, PIXELS)
    assert [len(views) for views in dataset.environments] == [7, 4]


def test_a_folder_that_is_no_data_set(pets):
    with pytest.raises(UsageError, match="cannot read .*nowhere: No such file"):
        find_spec("folder:nowhere", pets)
    with pytest.raises(UsageError, match="cat has 2 environment folders and 1 classes; expected at least 2"):
        find_spec("folder:pets/art/cat", pets)
    (pets / "pets" / "art" / "cow").mkdir()
    with pytest.raises(UsageError, match="book: cow"):
        open_dataset(find_spec("folder:pets", pets), pets, PIXELS)


def test_array_images():
    images = ArrayImages(np.full((2, 4, 4, 3), 7, np.uint8), np.array([1, 0], np.int8))
    assert len(images) == 2 and images.labels.dtype == np.int64
    assert images[1].mode == "RGB" and np.array(images[1]).max() == 7
    with pytest.raises(ValueError, match="expected uint8"):
        ArrayImages(np.zeros((2, 4, 4, 3)), np.zeros(2))


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "ShapesDG"])
def test_the_facts_of_a_data_set_fit_together(name):
    spec = load(DATASETS, "dataset", name)
    assert spec.name == name and spec.steps == 5001
    assert len(spec.environments) == len(spec.image_counts)
    assert spec.class_names is None or spec.class_names == tuple(sorted(spec.class_names))
    assert spec.class_names is None or len(spec.class_names) == spec.num_classes
    if spec.build is None:
        assert len(spec.domain_folders) == len(spec.environments) and spec.folder and spec.citation
        assert spec.domain_folders == tuple(sorted(spec.domain_folders))


def test_known_totals():
    totals = {"PACS": 9991, "VLCS": 10729, "OfficeHome": 15588, "TerraIncognita": 24330, "DomainNet": 586575}
    for name, total in totals.items():
        assert sum(load(DATASETS, "dataset", name).image_counts) == total


def test_specs_import_no_torch():
    code = """if True:
        import sys
        from domainbed_hp.registry import DATASETS, load
        for name in DATASETS:
            load(DATASETS, "dataset", name)
        assert not {"torch", "torchvision"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "size"), [("Debug28", 28), ("Debug224", 224)])
def test_debug_is_the_same_every_time(name, size):
    spec = load(DATASETS, "dataset", name)
    assert open_dataset(spec, None, PIXELS).class_names == ("0", "1")
    first, second = spec.build(), spec.build()
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        assert len(a) == 16 and a[0].size == (size, size) and set(a.labels) == {0, 1}
        assert np.array_equal(a.labels, b.labels) and np.array_equal(np.array(a[3]), np.array(b[3]))
    assert not np.array_equal(np.array(first[0][0]), np.array(first[1][0]))


def test_pacs(shared_data, capsys):
    spec = load(DATASETS, "dataset", "PACS")
    _, environments = read_folder(spec, shared_data)
    assert tuple(len(images) for images in environments) == spec.image_counts
    assert capsys.readouterr().err == ""
    theirs = ImageFolder(shared_data / "PACS" / "art_painting")
    assert environments[0].paths == [path for path, _ in theirs.samples]
    assert environments[0].labels.tolist() == theirs.targets
    result = split_environments([len(images) for images in environments], [0], 0)
    assert result[0]["out"][:5] == [548, 677, 1997, 977, 1553]
    assert all(images[0].size == (227, 227) for images in environments)
