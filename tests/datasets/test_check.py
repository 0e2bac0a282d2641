import json
import shutil

import numpy as np
import pytest
from made_archives import pets
from PIL import Image

from domainbed_hp.datasets.download.check import check
from domainbed_hp.datasets.download.unpack import unpack
from domainbed_hp.registry import DATASETS, UsageError
from domainbed_hp.scripts import download as script
from domainbed_hp.scripts import run


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with the pets, which the command knows."""
    spec = pets(tmp_path, "")
    unpack(tmp_path / "pets.zip", tmp_path / "data")
    (tmp_path / "data" / "Pets-1.0").rename(tmp_path / "data" / "pets")
    monkeypatch.setitem(DATASETS, "Pets", f"{__name__}:PETS")
    monkeypatch.setitem(globals(), "PETS", spec)
    return tmp_path / "data"


def command(data, capsys, *args):
    """Exit code and what was printed."""
    code = run(script.main, ["--data_dir", str(data), "--datasets", "Pets", "--check", *args])
    return code, capsys.readouterr().out


def test_right_data(data, capsys):
    code, text = command(data, capsys)
    assert code == 0
    assert [line.split() for line in text.splitlines()[1:7]] == [
        ["class", "art", "book"],
        ["--------", "-----", "------"],
        ["cat", "4", "4"],
        ["dog", "4", "4"],
        ["all", "8", "8"],
        ["expected", "8", "8"],
    ]
    assert text.endswith("Pets: right\n")
    code, text = command(data, capsys, "--json")
    (report,) = json.loads(text)
    assert code == 0 and report == {
        "ok": True,
        "dataset": "Pets",
        "folder": str(data / "pets"),
        "build": "",
        "problems": [],
        "counts": {"art": {"cat": 4, "dog": 4}, "book": {"cat": 4, "dog": 4}},
        "expected": {"art": 8, "book": 8},
        "undecodable": {},
        "duplicates": [],
    }


def test_images_that_cannot_be_decoded_are_named(data, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = data / "pets" / "art" / "cat" / "0.jpg"
    Image.fromarray(noise).save(cut, quality=95)
    cut.write_bytes(cut.read_bytes()[:3000])
    (data / "pets" / "book" / "dog" / "1.jpg").write_text("no image")
    (data / "pets" / "book" / "dog" / "2.jpg").write_bytes(b"")
    code, text = command(data, capsys)
    assert code == 1 and text.endswith("Pets: WRONG\n")
    for name in ("art/cat/0.jpg: ", "book/dog/1.jpg: not an image", "book/dog/2.jpg: "):
        assert f"cannot be decoded: {name}" in text
    code, text = command(data, capsys, "--json")
    assert code == 1 and sorted(json.loads(text)[0]["undecodable"]) == [
        "art/cat/0.jpg",
        "book/dog/1.jpg",
        "book/dog/2.jpg",
    ]


def test_an_image_that_cannot_be_read_is_named(data):
    path = data / "pets" / "art" / "cat" / "0.jpg"
    path.unlink()
    path.symlink_to(data / "nowhere.jpg")
    assert "No such file" in check(PETS, data, 0).undecodable["art/cat/0.jpg"]  # noqa: F821


def test_other_counts_are_wrong(data, capsys):
    (data / "pets" / "book" / "dog" / "3.jpg").unlink()
    code, text = command(data, capsys)
    assert code == 1 and "the numbers of images match no known build" in text
    code, text = command(data, capsys, "--json")
    (report,) = json.loads(text)
    assert report["build"] is None and report["counts"]["book"]["dog"] == 3 and not report["ok"]


def test_what_is_missing_or_too_much_is_listed(data, capsys):
    shutil.rmtree(data / "pets" / "book" / "dog")
    (data / "pets" / "raw").mkdir()
    code, text = command(data, capsys)
    assert code == 1
    assert f"missing class folder of {data / 'pets' / 'book'}: dog" in text
    assert f"unexpected environment folder of {data / 'pets'}: raw" in text
    assert [line.split() for line in text.splitlines()[3:5]] == [["cat", "4", "4"], ["dog", "4", "0"]]


def test_a_folder_too_much_is_wrong_by_itself(data):
    (data / "pets" / "raw").mkdir()
    report = check(PETS, data, 0)  # noqa: F821
    assert report.build == "" and not report.ok


def test_duplicates_across_environments_are_told_but_not_wrong(data, capsys):
    root = data / "pets"
    shutil.copy(root / "art" / "cat" / "0.jpg", root / "book" / "dog" / "1.jpg")
    shutil.copy(root / "art" / "cat" / "1.jpg", root / "art" / "dog" / "1.jpg")  # within one environment
    code, text = command(data, capsys)
    assert code == 0 and "1 images are in more than one environment:\n  art/cat/0.jpg = book/dog/1.jpg\n" in text
    code, text = command(data, capsys, "--json")
    assert json.loads(text)[0]["duplicates"] == [["art/cat/0.jpg", "book/dog/1.jpg"]]


def test_all_workers_find_the_same(data):
    (data / "pets" / "art" / "cat" / "0.jpg").write_text("no image")
    one, many = check(PETS, data, 0), check(PETS, data, 5)  # noqa: F821
    assert one == many and not one.ok


def test_a_folder_of_ones_own(data, capsys):
    (data / "pets" / "art" / "cat" / "0.jpg").write_text("no image")
    assert run(script.main, ["--data_dir", str(data), "--datasets", "folder:pets", "--check"]) == 1
    assert "cannot be decoded: art/cat/0.jpg" in capsys.readouterr().out
    assert run(script.main, ["--data_dir", str(data), "--datasets", "folder:pets"]) == 2
    assert "folder:pets has no archives to download" in capsys.readouterr().err


def test_one_data_set_that_is_not_there_costs_no_other_report(data, capsys):
    args = ["--data_dir", str(data), "--check", "--datasets", "Pets", "PACS", "folder:pets"]
    assert run(script.main, args) == 2
    out, err = capsys.readouterr()
    assert "Pets: right\n\nfolder:pets in" in out and out.endswith("folder:pets: right\n")
    assert err.startswith("error: PACS: cannot read ") and err.count("\n") == 1
    assert run(script.main, [*args, "--json"]) == 2
    first, gone, last = json.loads(capsys.readouterr().out)
    assert first["ok"] and last["ok"] and last["dataset"] == "folder:pets"
    assert gone == {"dataset": "PACS", "ok": False, "problems": [err.removeprefix("error: ").strip()]}


def test_a_report_is_out_before_the_next_data_set_is_read(data, capsys, monkeypatch):
    def stopped(spec, *_):
        if spec.name != "Pets":
            raise KeyboardInterrupt
        return check(spec, data, 0)

    monkeypatch.setattr("domainbed_hp.datasets.download.check.check", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(script.main, ["--data_dir", str(data), "--check", "--datasets", "Pets", "PACS"])
    assert capsys.readouterr().out.endswith("Pets: right\n")


def test_a_folder_that_is_not_there(data):
    with pytest.raises(UsageError, match="cannot read .*elsewhere/pets: No such file or directory. Download it first"):
        check(PETS, data / "elsewhere")  # noqa: F821
