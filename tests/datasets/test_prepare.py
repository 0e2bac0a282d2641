import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple

import numpy as np
import pytest
from pets import FILES, SPEC, draw, make_pets, preprocess
from PIL import Image

from domainbed_hp.datasets.prepared import index
from domainbed_hp.datasets.prepared import prepare as module
from domainbed_hp.datasets.prepared.index import Entry, read_index
from domainbed_hp.datasets.prepared.prepare import Environment, prepare
from domainbed_hp.datasets.prepared.reader import open_prepared
from domainbed_hp.registry import DATASETS, UsageError, load
from domainbed_hp.scripts import run
from domainbed_hp.scripts.prepare import main


@pytest.fixture
def pets(tmp_path):
    return make_pets(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def fresh(data_dir, tmp_path, **options):
    """Return the contents of the files that an undisturbed run writes."""
    copy = tmp_path / "elsewhere"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    os.symlink(data_dir / "pets", copy / "pets")
    return contents(prepare(SPEC, copy, 20, **options))


def counted(monkeypatch):
    """The indices that are encoded from now on, estimates aside."""
    seen = []
    monkeypatch.setattr(Environment, "estimate_size", lambda *_: 0.0)
    monkeypatch.setattr(Environment, "encode_image", lambda *args: seen.append(args[-1]) or ENCODE(*args))
    return seen


ENCODE = Environment.encode_image


def test_what_is_written(pets, capsys):
    folder = prepare(SPEC, pets, 20)
    assert folder == pets / "prepared" / "pets-20-crop-bicubic"
    files = contents(folder)
    assert sorted(files) == ["about.json", "art.bin", "art.csv", "my book.bin", "my book.csv"]
    about = json.loads(files["about.json"])
    assert about["class_names"] == ["cat", "dog"] and about["encoding"] == "raw" and about["format"] == 1
    assert files["art.csv"].splitlines()[0].decode() == ",".join(Entry._fields)
    entries = list(read_index(folder / "art.csv"))
    assert sorted(entry.path for entry in entries) == sorted(name[4:] for name in FILES if name.startswith("art/"))
    end = 0
    for entry in entries:
        source = pets / "pets" / "art" / entry.path
        data = source.read_bytes()
        assert (entry.source_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.mtime_ns == source.stat().st_mtime_ns and entry.offset == end and not entry.error
        assert (entry.training_bytes, entry.evaluation_bytes) == (entry.height * entry.width * 3, 20 * 20 * 3)
        end = entry.end
    assert end == len(files["art.bin"])
    out, err = capsys.readouterr()
    assert err == "" and "Pets: 13 images, about" in out and "within the limit of 32.0GB: raw" in out
    assert "  art: 9 images, " in out and "  my book: 4 images, " in out and out.count("0 skipped (new)") == 2


def test_a_second_run_touches_nothing(pets, capsys):
    folder = prepare(SPEC, pets, 20)
    before = identities(folder)
    capsys.readouterr()
    assert prepare(SPEC, pets, 20) == folder
    assert identities(folder) == before
    assert capsys.readouterr().out.count("(up to date)") == 2


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(pets, tmp_path, num_workers):
    assert contents(prepare(SPEC, pets, 20, num_workers=num_workers)) == fresh(pets, tmp_path)


def test_auto_compresses_where_raw_is_too_large(pets, capsys, monkeypatch):
    monkeypatch.setattr(module, "RAW_LIMIT", 10_000)
    folder = prepare(SPEC, pets, 20)
    assert json.loads((folder / "about.json").read_text())["encoding"] == "compressed"
    assert "above the limit of 10.0kB: compressed" in capsys.readouterr().out
    with Image.open(folder / "art.bin") as first:  # a JPEG, with others behind it
        assert first.format == "JPEG" and first.layer[0][1:3] == first.layer[1][1:3] == (1, 1)


def test_estimates_are_near(pets, capsys):
    folder = prepare(SPEC, pets, 20)
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert f"about {module.format_bytes(size)} raw" in capsys.readouterr().out


def test_another_encoding_only_on_demand(pets, tmp_path):
    folder = prepare(SPEC, pets, 20, encoding="compressed")
    before = identities(folder)
    prepare(SPEC, pets, 20)
    prepare(SPEC, pets, 20, encoding="compressed")
    assert identities(folder) == before
    prepare(SPEC, pets, 20, encoding="raw")
    assert contents(folder) == fresh(pets, tmp_path)


def test_a_full_disk_is_told_before_writing(pets, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5000))
    with pytest.raises(UsageError, match=r"about .*kB to write, 5.00kB free. Make room, or pass --encoding compressed"):
        prepare(SPEC, pets, 20)
    assert not list((pets / "prepared").rglob("*.*n*"))


def add(root):
    draw(99, (30, 30)).save(root / "art/cat/3.png")


def remove_last(root):
    (root / "art/dog/tiny.bmp").unlink()


def rename(root):
    (root / "art/cat/2.png").rename(root / "art/cat/3.png")


def relabel(root):
    (root / "art/cat/2.png").rename(root / "art/dog/0.png")


def overwrite(root):
    """The same size, another time."""
    path = root / "art/dog/tiny.bmp"
    data = bytearray(path.read_bytes())
    data[-4] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(0, 123456789))


@pytest.mark.parametrize("change", [add, remove_last, rename, relabel, overwrite])
def test_an_environment_that_changed_is_made_anew(pets, tmp_path, change):
    folder = prepare(SPEC, pets, 20)
    before = identities(folder)
    change(pets / "pets")
    assert prepare(SPEC, pets, 20) == folder
    after = identities(folder)
    assert {name for name in before if before[name] != after[name]} == {"art.bin", "art.csv"}
    assert contents(folder) == fresh(pets, tmp_path)


def test_other_times_renew_the_index_alone(pets, tmp_path, capsys):
    folder = prepare(SPEC, pets, 20)
    before = identities(folder)
    os.utime(pets / "pets/art/dog/a.png", ns=(0, 123456789))
    prepare(SPEC, pets, 20)
    after = identities(folder)
    assert {name for name in before if before[name] != after[name]} == {"art.csv"}
    assert contents(folder) == fresh(pets, tmp_path)
    assert "index renewed" in capsys.readouterr().out


def test_who_reads_a_removed_environment_reads_on(pets):
    prepare(SPEC, pets, 20)
    reading = open_prepared(SPEC, pets, preprocess())
    expected = [reading.environments[0].load_training_view(i).copy() for i in range(9)]
    add(pets / "pets")
    prepare(SPEC, pets, 20)
    assert all(np.array_equal(reading.environments[0].load_training_view(i), expected[i]) for i in range(9))


def test_also_where_a_run_was_killed_after_half_of_removing_it(pets, tmp_path):
    folder = prepare(SPEC, pets, 20)
    reading = open_prepared(SPEC, pets, preprocess())
    expected = [reading.environments[0].load_training_view(i).copy() for i in range(9)]
    add(pets / "pets")
    (folder / "art.csv").unlink()
    prepare(SPEC, pets, 20)
    assert contents(folder) == fresh(pets, tmp_path)
    assert all(np.array_equal(reading.environments[0].load_training_view(i), expected[i]) for i in range(9))


def damage(path):
    """A header that is fine, and half of the rest."""
    draw(7, (64, 64)).save(path)
    os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_image_stops_and_what_was_done_is_kept(pets, tmp_path, monkeypatch):
    path = pets / "pets/art/dog/a.png"
    good = path.read_bytes()
    damage(path)
    seen = counted(monkeypatch)
    with pytest.raises(UsageError, match=r"art/dog/a.png: cannot decode this image .*--on_error skip"):
        prepare(SPEC, pets, 20)
    assert seen == [0, 1, 2, 3, 4, 5]
    path.write_bytes(good)
    seen.clear()
    folder = prepare(SPEC, pets, 20)
    assert seen == [5, 6, 7, 8, 0, 1, 2, 3]
    assert contents(folder) == fresh(pets, tmp_path)


def test_what_is_being_renewed_is_not_complete(pets, tmp_path, capsys):
    folder = prepare(SPEC, pets, 20)
    good = (pets / "pets/art/dog/a.png").read_bytes()
    damage(pets / "pets/art/dog/a.png")
    with pytest.raises(UsageError):
        prepare(SPEC, pets, 20)
    assert open_prepared(SPEC, pets, preprocess()) is None
    assert "art not complete" in capsys.readouterr().err
    (pets / "pets/art/dog/a.png").write_bytes(good)
    prepare(SPEC, pets, 20)
    assert contents(folder) == fresh(pets, tmp_path)


def test_a_full_disk_is_told_and_what_was_saved_is_gone_on_with(pets, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index, "append_entries", full)
        with pytest.raises(UsageError, match="No space left on device. Correct this and run again; it goes on from"):
            prepare(SPEC, pets, 20)
    assert contents(prepare(SPEC, pets, 20)) == fresh(pets, tmp_path)


def test_a_damaged_image_is_recorded_and_left_out_on_demand(pets, tmp_path, capsys):
    damage(pets / "pets/art/dog/a.png")
    (pets / "pets/art/cat/2.png").write_text("no image at all")
    folder = prepare(SPEC, pets, 20, on_error="skip")
    assert "art: 7 images, " in (out := capsys.readouterr().out) and "2 skipped (new)" in out
    entries = {entry.path: entry for entry in read_index(folder / "art.csv")}
    assert len(entries) == 9
    assert "truncated" in entries["dog/a.png"].error
    assert entries["cat/2.png"].error == "not an image"
    opened = open_prepared(SPEC, pets, preprocess())
    assert [len(views) for views in opened.environments] == [7, 4]
    assert opened.environments[0].labels.tolist() == [0] * 4 + [1] * 3
    before = identities(folder)
    prepare(SPEC, pets, 20)
    assert identities(folder) == before


def test_removing_what_was_left_out_renews_the_environment(pets, tmp_path):
    (pets / "pets/art/dog/tiny.bmp").write_text("no image")
    folder = prepare(SPEC, pets, 20, on_error="skip")
    (pets / "pets/art/dog/tiny.bmp").unlink()
    prepare(SPEC, pets, 20)
    assert contents(folder) == fresh(pets, tmp_path)


def test_lack_of_memory_is_no_damaged_image(pets, monkeypatch):
    def no_memory(file):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        prepare(SPEC, pets, 20, on_error="skip")


def test_names_that_are_no_text(pets):
    name = os.fsdecode(b"art/cat/\xff\xe9.png")
    try:
        draw(50, (30, 30)).save(pets / "pets" / name)
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    folder = prepare(SPEC, pets, 20)
    assert name[4:] in [entry.path for entry in read_index(folder / "art.csv")]
    before = identities(folder)
    prepare(SPEC, pets, 20)
    assert identities(folder) == before
    assert [len(views) for views in open_prepared(SPEC, pets, preprocess()).environments] == [10, 4]


def test_a_class_without_images_is_an_error(pets):
    for name in ("a.png", "b.jpeg"):
        (pets / "pets/my book/cat" / name).write_text("no image")
    with pytest.raises(UsageError, match="no image that can be decoded in .*my book/cat"):
        prepare(SPEC, pets, 20, on_error="skip")
    (pets / "pets/my book/cat/a.png").unlink()
    (pets / "pets/my book/cat/b.jpeg").unlink()
    with pytest.raises(UsageError, match="no images in .*my book/cat"):
        prepare(SPEC, pets, 20)


def test_a_link_to_nowhere_is_named(pets):
    os.symlink(pets / "gone.png", pets / "pets/art/cat/link.png")
    for on_error in ("stop", "skip"):
        with pytest.raises(UsageError, match=r"link.png: cannot read this file \(No such file"):
            prepare(SPEC, pets, 20, on_error=on_error)


@pytest.mark.parametrize("seed", range(25))
def test_any_torn_end_is_resumed(pets, tmp_path, seed, monkeypatch):
    """The index cut anywhere, the data cut or grown, and an entry whose file has changed since."""
    expected = fresh(pets, tmp_path)
    folder = prepare(SPEC, pets, 20)
    index, data, choose = folder / "art.csv", folder / "art.bin", random.Random(seed)
    partial = index.rename(f"{index}.partial")
    os.truncate(partial, choose.randint(0, partial.stat().st_size))
    os.truncate(data, choose.randint(0, data.stat().st_size * 3 // 2))
    if seed % 3 == 0:
        partial.write_bytes(partial.read_bytes() + b"\0\0\0,1,\n")
    if seed % 5 == 0:
        (folder / "art.csv.partial.tmp").write_text("half")
        (folder / "about.json.tmp").write_text("half")
    prepare(SPEC, pets, 20)
    assert contents(folder) == expected


def test_a_run_that_was_killed_before_its_commit_encodes_nothing(pets, tmp_path, monkeypatch):
    folder = prepare(SPEC, pets, 20)
    (folder / "art.csv").rename(folder / "art.csv.partial")
    seen = counted(monkeypatch)
    prepare(SPEC, pets, 20)
    assert seen == [] and contents(folder) == fresh(pets, tmp_path)


def test_a_resumed_run_encodes_what_is_missing_alone(pets, monkeypatch):
    folder = prepare(SPEC, pets, 20)
    partial = (folder / "art.csv").rename(folder / "art.csv.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:5]) + lines[5][:-1])
    seen = counted(monkeypatch)
    prepare(SPEC, pets, 20)
    assert seen == [4, 5, 6, 7, 8]


def test_the_index_never_runs_ahead_of_the_data(pets, monkeypatch):
    """At each sync the data lie on the disk before the index tells of them."""
    seen = []

    def append(file, entries):
        end = entries[-1].end if entries else 0
        seen.append((len(entries), os.stat(file.name.replace(".csv.partial", ".bin")).st_size >= end))
        return APPEND(file, entries)

    APPEND = index.append_entries
    monkeypatch.setattr(index, "append_entries", append)
    monkeypatch.setattr(module, "SYNC_EVERY", 4)
    prepare(SPEC, pets, 20)
    assert seen == [(4, True), (4, True), (1, True), (4, True), (0, True)]


def test_damaged_data_is_made_anew(pets, tmp_path):
    expected = fresh(pets, tmp_path)
    folder = prepare(SPEC, pets, 20)
    os.truncate(folder / "art.bin", 1000)
    (folder / "my book.bin").unlink()
    prepare(SPEC, pets, 20)
    assert contents(folder) == expected
    with open(folder / "art.bin", "ab") as file:
        file.write(b"more")
    prepare(SPEC, pets, 20)
    assert contents(folder) == expected


def test_another_format_and_what_is_left_of_others_are_cleared(pets, tmp_path):
    expected = fresh(pets, tmp_path)
    folder = prepare(SPEC, pets, 20)
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"format": 0}))
    (folder / "art.bin").write_bytes(bytes((folder / "art.bin").stat().st_size))
    for name in ("gone.csv", "gone.bin", "gone.csv.partial", "lock"):
        (folder / name).write_text("")
    prepare(SPEC, pets, 20)
    assert contents(folder) == expected


def test_two_at_once(pets, tmp_path, monkeypatch, capsys):
    expected = fresh(pets, tmp_path)
    encoded = Counter()

    def slowly(environment, about, on_error, i):
        encoded[environment.images.paths[i]] += 1
        time.sleep(0.02)
        return ENCODE(environment, about, on_error, i)

    monkeypatch.setattr(Environment, "estimate_size", lambda *_: 0.0)
    monkeypatch.setattr(Environment, "encode_image", slowly)
    threads = [threading.Thread(target=prepare, args=(SPEC, pets, 20)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(encoded.values()) == {1} and len(encoded) == 13
    assert contents(pets / "prepared" / "pets-20-crop-bicubic") == expected
    assert capsys.readouterr().err.count("waiting for another prepare") == 2


def test_the_command(pets, capsys):
    assert main(["--data_dir", str(pets), "--dataset", "folder:pets", "--image_size", "16", "--resize", "squash"]) == 0
    assert sorted(contents(pets / "prepared" / "pets-16-squash-bicubic"))[1] == "art.bin"
    assert str(pets / "prepared" / "pets-16-squash-bicubic") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "ShapesDG"], "ShapesDG is made, not read from image files: there is nothing to prepare"),
        (["--dataset", "PACS"], "pass --data_dir, the folder that holds PACS/"),
        (["--dataset", "pacs"], "unknown dataset 'pacs'. Did you mean 'PACS'?"),
        (["--dataset", "PACS", "--data_dir", "nowhere"], "PACS: cannot read nowhere/PACS: No such file or directory"),
        (["--dataset", "PACS", "--data_dir", ".", "--image_size", "0"], "image_size and num_workers: got 0 and"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert run(main, arguments) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_not_as_expected_are_listed(pets):
    (pets / "pets/art/cow").mkdir()
    (pets / "pets/raw").mkdir()
    with pytest.raises(UsageError, match=r"unexpected environment folder .*raw\n.*unexpected class folder .*: cow"):
        prepare(SPEC, pets, 20)


def test_no_torch():
    code = "import sys, domainbed_hp.datasets.prepared.prepare\nassert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PACS = load(DATASETS, "dataset", "PACS")


def link_pacs(shared_data, data_dir, domains=PACS.domain_folders, per_class=None, copies=1):
    """The first images of each class of PACS, each `copies` times, as links."""
    for domain in domains:
        for name in PACS.class_names:
            into = data_dir / "pets" / domain / name
            into.mkdir(parents=True)
            for path in sorted((shared_data / "PACS" / domain / name).iterdir())[:per_class]:
                for i in range(copies):
                    (into / f"{i}_{path.name}").symlink_to(path)
    return data_dir


def command(data_dir, *more):
    arguments = ["--data_dir", str(data_dir), "--dataset", "folder:pets", "--image_size", "64", "--num_workers", "2"]
    return [sys.executable, "-m", "domainbed_hp.scripts.prepare", *arguments, *more]


@pytest.mark.slow
def test_killed_at_any_moment(shared_data, tmp_path):
    """Every second run starts with a prepared folder whose source has changed since."""
    data_dir = link_pacs(shared_data, tmp_path, ("photo", "sketch"), per_class=100)
    folder, before = data_dir / "prepared" / "pets-64-crop-bicubic", data_dir / "before"
    moved = [min((data_dir / "pets" / domain / "dog").iterdir()) for domain in ("photo", "sketch")]
    for path in moved:
        path.rename(data_dir / path.name)
    subprocess.run(command(data_dir), check=True, stdout=subprocess.DEVNULL)
    folder.rename(before)
    for path in moved:
        (data_dir / path.name).rename(path)

    def start(trial):
        shutil.rmtree(folder, ignore_errors=True)
        if trial % 2:
            shutil.copytree(before, folder)
        return subprocess.Popen(command(data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    durations = []
    for trial in range(4):
        began = time.monotonic()
        assert start(trial).wait() == 0
        durations.append(time.monotonic() - began)
    expected, choose, seen = contents(folder), random.Random(0), Counter()
    for trial in range(12):
        child = start(trial)
        time.sleep(choose.uniform(0.1, min(durations)))
        child.send_signal(signal.SIGKILL)
        seen["killed"] += child.wait() == -signal.SIGKILL
        seen.update(path.suffix or path.name for path in folder.glob("*"))
        done = subprocess.run(command(data_dir), check=True, capture_output=True, text=True)
        seen["resumed"] += "resumed after" in done.stdout
        assert contents(folder) == expected, f"trial {trial}"
    print(f"undisturbed {min(durations):.1f} s, seen after a kill: {dict(seen)}")
    assert seen["killed"] >= 7 and seen[".partial"] >= 3 and seen["resumed"] >= 1


READ_ALL = """
import sys
from pathlib import Path
from types import SimpleNamespace
from domainbed_hp.datasets.open import find_spec
from domainbed_hp.datasets.prepared.reader import open_prepared
pixels = SimpleNamespace(size=64, resize="crop", interpolation="bicubic", augmentation="none")
prepared = open_prepared(find_spec("folder:pets", sys.argv[1]), Path(sys.argv[1]), pixels)
for views in prepared.environments:
    for i in range(len(views)):
        views.load_training_view(i).max(), views.load_evaluation_view(i).max()
"""
PREPARE = """
import sys
from domainbed_hp.scripts.prepare import main
main(["--data_dir", sys.argv[1], "--dataset", "folder:pets", "--image_size", "64", "--num_workers", "2"])
"""


def peak_bytes(code, data_dir):
    """Not getrusage: a child's ru_maxrss begins with that of the process that started it."""
    code += 'print(open("/proc/self/status").read())'
    done = subprocess.run([sys.executable, "-c", code, str(data_dir)], check=True, capture_output=True, text=True)
    return int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_images(shared_data, tmp_path):
    """But for the list of their paths."""
    once = link_pacs(shared_data, tmp_path / "once", ("cartoon", "photo"))
    often = link_pacs(shared_data, tmp_path / "often", ("cartoon", "photo"), copies=4)
    images = 3 * (2344 + 1670)
    for name, code in (("prepare", PREPARE), ("up to date", PREPARE), ("read", READ_ALL)):
        one, four = peak_bytes(code, once), peak_bytes(code, often)
        grown = (four - one) / images
        print(f"{name}: {one / 1e6:.1f} MB at 1 x, {four / 1e6:.1f} MB at 4 x PACS, {grown:.0f} bytes an image")
        assert grown < 600
