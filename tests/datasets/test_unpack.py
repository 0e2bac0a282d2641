import errno
import gzip
import io
import os
import random
import shutil
import stat
import tarfile
import zipfile
import zlib

import pytest
from made_archives import write_tar, write_zip

from domainbed_hp.datasets.download import unpack as module
from domainbed_hp.datasets.download.unpack import find_kind, read_unpacked_size, unpack
from domainbed_hp.registry import UsageError

FILES = {"top/a/1.jpg": b"one" * 1000, "top/b/2.jpg": b"", "top/b/3 ü.txt": b"three"}
LITTER = {"__MACOSX/top/._1.jpg": b"x", "top/.DS_Store": b"x", "top/a/._1.jpg": b"x", ".hidden/4.jpg": b"x"}
NAMES = ("x.zip", "x.tar", "x.tar.gz")


def write(path, files):
    (write_zip if path.name.endswith("zip") else write_tar)(path, files)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path):
    """Unpacks an archive that must be refused for `reason`, and sees that nothing was written outside `into`."""

    def unpack_refused(archive, reason):
        before = {name: data for name, data in contents(tmp_path).items() if not name.startswith("inner/into/")}
        into = tmp_path / "inner" / "into"
        shutil.rmtree(into, ignore_errors=True)
        with pytest.raises(UsageError, match=reason) as caught:
            unpack(archive, into)
        assert str(archive) in str(caught.value)
        after = contents(tmp_path)
        assert {name: after[name] for name in after if not name.startswith("inner/into/")} == before

    return unpack_refused


@pytest.mark.parametrize("name", NAMES)
def test_files_come_out_as_they_went_in_without_litter(tmp_path, name):
    write(tmp_path / name, FILES | LITTER)
    unpack(tmp_path / name, tmp_path / "into")
    assert contents(tmp_path / "into") == FILES


def test_the_kind_follows_from_the_content(tmp_path):
    path = tmp_path / "file"
    for name in NAMES:
        write(tmp_path / name, FILES)
        (tmp_path / name).rename(path)
        assert find_kind(path) == name[2:]
    for other in (b"", b"<html>", b"\x89PNG"):
        path.write_bytes(other)
        assert find_kind(path) == ""
        with pytest.raises(UsageError, match="neither a zip nor a tar"):
            unpack(path, tmp_path / "into")


@pytest.mark.parametrize("archive", NAMES)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/abs.jpg", "an absolute path"),
        ("C:/abs.jpg", "an absolute path"),
        ("\\abs.jpg", "an absolute path"),
        ("../out.jpg", "leaves the folder"),
        ("a/../../out.jpg", "leaves the folder"),
        ("a/../../../out.jpg", "leaves the folder"),
        ("..\\out.jpg", "leaves the folder"),
        ("a/..", "leaves the folder"),
        ("a\\b.jpg", "a backslash"),
        ("__MACOSX/../../out.jpg", "leaves the folder"),
    ],
)
def test_paths_that_lead_elsewhere(tmp_path, refused, archive, name, reason):
    write(tmp_path / archive, {"good.jpg": b"x", name: b"evil"})
    refused(tmp_path / archive, reason)


def test_a_null_in_the_name_of_a_zips_member(tmp_path, refused):
    write_zip(tmp_path / "x.zip", {"a.jpg_/../b": b"x"})
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"a.jpg_/", b"a.jpg\0/"))
    refused(tmp_path / "x.zip", "leaves the folder")


def test_an_absolute_path_to_a_real_place(tmp_path, refused):
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(b"precious")
    for archive in NAMES:
        write(tmp_path / archive, {str(victim): b"evil"})
        refused(tmp_path / archive, "an absolute path")


@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_tar_members_that_are_no_files(tmp_path, refused, type_, reason):
    (tmp_path / "victim").write_bytes(b"precious")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("odd")
        info.type, info.linkname = type_, "../../victim"
        tar.addfile(info)
        through = tarfile.TarInfo("odd/file")
        through.size = 4
        tar.addfile(through, io.BytesIO(b"evil"))
    refused(tmp_path / "x.tar", reason)


@pytest.mark.parametrize(("type_", "reason"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "a device")])
def test_zip_members_that_are_no_files(tmp_path, refused, type_, reason):
    info = zipfile.ZipInfo("odd")
    info.external_attr = (type_ | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(info, "../../victim")
    refused(tmp_path / "x.zip", reason)


@pytest.mark.parametrize("archive", NAMES)
@pytest.mark.parametrize("again", ["a/1.jpg", "A/1.JPG", "./a/1.jpg", "a//1.jpg"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice(tmp_path, refused, archive, again):
    path = tmp_path / archive
    if archive == "x.zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/1.jpg", b"one")
            file.writestr(again, b"other")
    else:
        with tarfile.open(path, "w:gz" if archive.endswith("gz") else "w") as tar:
            for name in ("a/1.jpg", again):
                tar.addfile(tarfile.TarInfo(name))
    refused(path, "there is a file of this name already")


def test_the_same_letters_written_otherwise_are_the_same_name(tmp_path, refused):
    write_zip(tmp_path / "x.zip", {"\u00e9.jpg": b"x", "e\u0301.jpg": b"x"})
    refused(tmp_path / "x.zip", "there is a file of this name already")


@pytest.mark.parametrize("archive", ["x.zip", "x.tar.gz"])
def test_bombs(tmp_path, refused, monkeypatch, archive):
    monkeypatch.setattr(module, "SMALL", 2**20)
    write(tmp_path / archive, {"good.jpg": b"x", "bomb.jpg": bytes(2**22)})
    refused(tmp_path / archive, r"'bomb.jpg': with it the archive unpacks to more than 1,048,576 bytes")
    assert not (tmp_path / "inner" / "into" / "bomb.jpg").exists()
    write(tmp_path / archive, {f"{i}.jpg": bytes(2**19) for i in range(3)})
    refused(tmp_path / archive, "'2.jpg': with it the archive unpacks to more")


def test_what_grows_little_may_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 2**10)
    noise = bytes(i * i % 251 for i in range(2**14))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.jpg", noise)
    unpack(tmp_path / "x.zip", tmp_path / "into")
    assert contents(tmp_path / "into") == {"a.jpg": noise}


def test_a_bomb_in_a_header(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 2**16)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        noise = tarfile.TarInfo("noise.jpg")  # makes the archive large enough for the header, were it a file
        noise.size = 2**16
        tar.addfile(noise, io.BytesIO(random.Random(0).randbytes(noise.size)))
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"comment": "x" * 2**20}
        tar.addfile(info)
    refused(tmp_path / "x.tar.gz", "a header, or the whole archive, is too large")


def test_a_bomb_after_the_end(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 2**20)
    write(tmp_path / "x.tar", FILES)
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data + bytes(2**24)))
    refused(tmp_path / "x.tar.gz", "is too large")


def test_a_zip_that_holds_more_than_it_says(tmp_path, refused):
    write_zip(tmp_path / "x.zip", {"a.jpg": bytes(10_000)})
    data = (tmp_path / "x.zip").read_bytes()
    said, less = (10_000).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert data.count(said) == 2
    (tmp_path / "x.zip").write_bytes(data.replace(said, less))
    refused(tmp_path / "x.zip", "damaged")
    assert len(contents(tmp_path / "inner" / "into").get("a.jpg", b"")) <= 100


def test_more_members_than_any_data_set_has(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBERS", 5)
    for archive in NAMES:
        write(tmp_path / archive, {f"{i}.jpg": b"x" for i in range(6)})
        refused(tmp_path / archive, "'5.jpg': more than 5 members")


def test_an_encrypted_zip(tmp_path, refused):
    write_zip(tmp_path / "x.zip", {"a.jpg": b"x"})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    refused(tmp_path / "x.zip", "'a.jpg': encrypted")


@pytest.mark.parametrize("archive", NAMES)
def test_cut_short_anywhere(tmp_path, archive):
    noise = bytes(zlib.crc32(i.to_bytes(2, "big")) % 256 for i in range(3000))
    write(tmp_path / archive, {"a.jpg": noise, "b.jpg": noise})
    data = (tmp_path / archive).read_bytes()
    # A tar is padded with zeros after its end; all before that counts.
    end = len(data.rstrip(b"\0")) if archive == "x.tar" else len(data)
    for k, cut in enumerate([*range(300, end, 97), 1024, end - 1]):
        (tmp_path / archive).write_bytes(data[:cut])
        with pytest.raises(UsageError, match="damaged|neither"):
            unpack(tmp_path / archive, tmp_path / f"into{k}")


@pytest.mark.parametrize("archive", ["x.zip", "x.tar.gz"])
def test_a_flipped_bit(tmp_path, archive):
    noise = bytes(zlib.crc32(i.to_bytes(2, "big")) % 256 for i in range(3000))
    write(tmp_path / archive, {"a.jpg": noise})
    data = bytearray((tmp_path / archive).read_bytes())
    data[1500] ^= 16
    (tmp_path / archive).write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        unpack(tmp_path / archive, tmp_path / "into")


def test_a_damaged_header_in_the_middle_of_a_tar(tmp_path, refused):
    write_tar(tmp_path / "x.tar", {"a.jpg": b"x", "b.jpg": b"y"})
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[1024 + 150] ^= 1  # the checksum of b.jpg's header
    (tmp_path / "x.tar").write_bytes(data)
    refused(tmp_path / "x.tar", "damaged")


def test_a_file_where_a_folder_is(tmp_path, refused):
    write_zip(tmp_path / "x.zip", {"a/1.jpg": b"x", "a": b"y"})
    refused(tmp_path / "x.zip", "at 'a'")


def test_unpacked_size(tmp_path):
    for name in NAMES:
        write(tmp_path / name, FILES)
    assert read_unpacked_size(tmp_path / "x.zip") == 3005
    assert read_unpacked_size(tmp_path / "x.tar.gz") == (tmp_path / "x.tar.gz").stat().st_size
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 and nothing more")
    assert read_unpacked_size(tmp_path / "x.zip") == 21


@pytest.mark.parametrize("archive", NAMES)
@pytest.mark.parametrize(("number", "at"), [(errno.ENOSPC, "write"), (errno.EMFILE, "open"), (errno.EDQUOT, "mkdir")])
def test_a_disk_that_takes_no_more_is_not_the_archives_fault(tmp_path, monkeypatch, archive, number, at):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    class Full(io.BytesIO):
        write = fails

    write(tmp_path / archive, FILES)
    (tmp_path / "into").mkdir()
    if at == "mkdir":
        monkeypatch.setattr(os, "mkdir", fails)
    else:
        # As the two modules write files; they open the archive itself by other names.
        for writer, name in ((zipfile, "open"), (tarfile, "bltn_open")):
            monkeypatch.setattr(writer, name, fails if at == "open" else lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        unpack(tmp_path / archive, tmp_path / "into")
    assert caught.value.errno == number


def test_an_impossible_position_is_the_archives_fault(tmp_path, refused, monkeypatch):
    def fails(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    write_zip(tmp_path / "x.zip", FILES)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    refused(tmp_path / "x.zip", "damaged, or not what its name says at 'top/a/1.jpg': .*Invalid argument")


def test_a_file_of_an_earlier_archive_is_not_written_over(tmp_path):
    for i, name in enumerate(NAMES):
        write(tmp_path / name, {"a.jpg": bytes(10 + i)})
    unpack(tmp_path / NAMES[0], tmp_path / "into")
    for name in NAMES:
        with pytest.raises(UsageError, match="refused because of 'a.jpg': there is a file of this name already"):
            unpack(tmp_path / name, tmp_path / "into")
    assert contents(tmp_path / "into") == {"a.jpg": bytes(10)}


def test_headers_that_announce_headers_without_end(tmp_path, refused):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2000):
            info = tarfile.TarInfo("././@LongLink")
            info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
            tar.addfile(info, io.BytesIO(b"x\0"))
    refused(tmp_path / "x.tar", "damaged")


@pytest.mark.parametrize("error", [RecursionError, OverflowError, IndexError, OSError])
def test_whatever_a_reader_raises_is_damage(tmp_path, refused, monkeypatch, error):
    def fails(*_):
        raise error("odd")

    write_zip(tmp_path / "x.zip", FILES)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    refused(tmp_path / "x.zip", "damaged, or not what its name says at 'top/a/1.jpg': odd")
    monkeypatch.setattr(zipfile.ZipFile, "infolist", fails)
    assert read_unpacked_size(tmp_path / "x.zip") == (tmp_path / "x.zip").stat().st_size
    refused(tmp_path / "x.zip", "damaged, or not what its name says: odd")


def test_too_little_memory_is_not_the_archives_fault(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    write_zip(tmp_path / "x.zip", FILES)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    with pytest.raises(MemoryError):
        unpack(tmp_path / "x.zip", tmp_path / "into")
