"""Unpack an archive from an untrusted source: zip, tar, tar.gz.

zipfile and tarfile's data filter write the members. Before, every member is checked and every byte counted: an archive
with anything that a data set does not need, such as a link, a device or a path out of the folder, is refused.
"""

import errno
import gzip
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple, cast

from tqdm import tqdm

from domainbed_hp.datasets.folder import is_ignored
from domainbed_hp.registry import UsageError

MAX_GROWTH = 30
"""Largest ratio of the unpacked size to an archive's. Photographs have about 1, drawings and annotations up to 20."""
SMALL = 64 * 2**20
"""Number of bytes that any archive may unpack to."""
MAX_MEMBERS = 1_000_000
CHUNK = 2**20
CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError)
"""Errors of writing where the archive has a file and a folder of one name."""


class Member(NamedTuple):
    """One entry of an archive; `problem` is the reason to refuse it, `extract` writes it."""

    name: str
    size: int
    is_folder: bool
    problem: str
    extract: Callable[[], object]


def find_kind(path: Path) -> str:
    """Return "zip", "tar", "tar.gz" or "" from the first bytes of a file, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if start.startswith(b"\x1f\x8b"):
        return "tar.gz"
    return "tar" if start[257:262] == b"ustar" else ""


def unpack(archive: Path, into: Path) -> None:
    """Write the files of `archive` under `into`, without hidden files and the litter of archive programs.

    Raises:
        UsageError: the archive is refused or damaged; the caller then removes `into`.
        OSError: the disk is full or faulty.
    """
    limit = max(SMALL, MAX_GROWTH * archive.stat().st_size)
    into.mkdir(parents=True, exist_ok=True)
    read = {"zip": read_zip, "tar": read_tar, "tar.gz": read_tar}.get(find_kind(archive))
    if read is None:
        raise UsageError(f"{archive}: got a file that is neither a zip nor a tar archive. Download it again.")
    name, total, names = "", 0, set[str]()
    try:
        with (
            closing(read(archive, into, limit)) as members,
            tqdm(desc=f"unpack {archive.name}", unit="B", unit_scale=True, disable=None) as bar,
        ):
            for count, member in enumerate(members, 1):
                name, total = member.name, total + member.size
                # Macs and Windows take names that differ in case, or in how an accent is written, for one.
                path = PurePosixPath(name)
                key = unicodedata.normalize("NFC", str(path)).casefold()
                problem = member.problem or check_name(name)
                if not problem and count > MAX_MEMBERS:
                    problem = f"more than {MAX_MEMBERS:,} members"
                if not problem and total > limit:
                    problem = f"with it the archive unpacks to more than {limit:,} bytes, {MAX_GROWTH} times its size"
                if not problem and not member.is_folder and (key in names or (into / path).is_file()):
                    problem = "there is a file of this name already, or of one that differs in upper and lower case"
                if problem:
                    raise UsageError(
                        f"{archive}: refused because of {name!r}: {problem}. Download it again, or from another source."
                    )
                if not member.is_folder and not any(map(is_ignored, path.parts)):
                    names.add(key)
                    member.extract()
                    if (size := (into / path).stat().st_size) != member.size:
                        raise EOFError(f"got {size:,} of {member.size:,} bytes")
                    bar.update(size)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # damaged archives make their readers raise almost anything
        # An error of the disk has a number; EINVAL is a position in the archive that does not exist.
        number = error.errno if isinstance(error, OSError) and not isinstance(error, CLASHES) else None
        if number not in (None, errno.EINVAL):
            raise
        where = f" at {name!r}" if name else ""
        raise UsageError(
            f"{archive}: damaged, or not what its name says{where}: {error}. Download it again."
        ) from error


def read_unpacked_size(archive: Path) -> int:
    """Return the number of bytes that a zip says it holds; of a tar, the least that it can hold."""
    if find_kind(archive) == "zip":
        with suppress(Exception), zipfile.ZipFile(archive) as file:  # `unpack` reports what is wrong
            return sum(info.file_size for info in file.infolist())
    return archive.stat().st_size


def check_name(name: str) -> str:
    """Return the reason to refuse a member of this name, "" where there is none."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path that leaves the folder"
    return "a backslash or a null in the path" if "\\" in name or "\0" in name else ""


def read_zip(archive: Path, into: Path, _limit: int) -> Generator[Member, None, None]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            file_type = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            problem = "" if file_type in (0, stat.S_IFREG, stat.S_IFDIR) else "a link or a device"
            problem = "encrypted" if info.flag_bits & 1 else problem
            # `orig_filename`: `filename` is cut at a null, and on Windows its backslashes are turned.
            yield Member(info.orig_filename, info.file_size, info.is_dir(), problem, partial(file.extract, info, into))


def read_tar(archive: Path, into: Path, limit: int) -> Generator[Member, None, None]:
    """Yield the members of a tar or tar.gz."""
    with gzip.open(archive) if find_kind(archive) == "tar.gz" else open(archive, "rb") as file:
        stream = BoundedStream(cast(BinaryIO, file), archive, limit)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            while (info := tar.next()) is not None:
                setattr(tar, "members", [])  # noqa: B010  tarfile would hold all that it has read
                problem = "" if info.isreg() or info.isdir() else "a link or a device"
                extract = partial(tar.extract, info, into, set_attrs=False, filter="data")
                yield Member(info.name, info.size, info.isdir(), problem, extract)
            # tarfile takes the end of the file, and a header that it cannot read, for the end of the archive.
            if stream.last != bytes(tarfile.BLOCKSIZE):
                raise EOFError("the end of the archive is missing")
        while stream.read(CHUNK):  # on to the checksum of the gzip stream
            pass


class BoundedStream:
    """A stream for tarfile with a bound on all bytes, and on the bytes of every read, for headers can be bombs too."""

    def __init__(self, file: BinaryIO, archive: Path, limit: int) -> None:
        self.file, self.archive, self.limit = file, archive, limit
        self.seek, self.tell = file.seek, file.tell
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL or self.file.tell() > 2 * self.limit:  # twice: headers and padding come on top
            raise UsageError(f"{self.archive}: refused: a header, or the whole archive, is too large")
        self.last = self.file.read(size)
        return self.last
