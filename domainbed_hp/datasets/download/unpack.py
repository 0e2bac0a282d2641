"""Unpack an archive that nobody vouches for: zip, tar, tar.gz.

Every member is checked before it is written, every byte is counted as it is, and an archive with anything in it that a
data set has no use for (a link, a device, a path that leaves the folder) is refused as a whole.
"""

import gzip
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, TypeVar, cast

from tqdm import tqdm

from domainbed_hp.datasets.folder import is_ignored
from domainbed_hp.registry import UsageError

MIB = 2**20
MAX_GROWTH = 30
"""Times its own size that an archive may unpack to. Photographs give about 1, drawings and annotations up to 20."""
SMALL = 64 * MIB
"""What every archive may unpack to, however small it is."""
MAX_MEMBERS = 1_000_000
CHUNK = MIB
KNOWN_TYPES = (0, stat.S_IFREG, stat.S_IFDIR)
"""Of a zip's members; only Unix fills one in."""
CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError, ValueError)
"""What writing raises where the archive is to blame: a file where it has a folder too, a name that is none."""

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One entry of an archive; `odd` says why it is neither a file nor a folder, `folder` has no bytes to `open`."""

    name: str
    size: int
    folder: bool
    odd: str
    open: Callable[[], IO[bytes]]


def kind(path: Path) -> str:
    """`zip`, `tar`, `tar.gz`, or empty: what a file is by its first bytes, whatever its name says."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if start.startswith(b"\x1f\x8b"):
        return "tar.gz"
    return "tar" if start[257:262] == b"ustar" else ""


def unpack(archive: Path, into: Path) -> None:
    """Write the files of `archive` under `into`; hidden files and litter of archive programs are left out.

    `UsageError` names the archive, the member and the reason. `OSError`: the disk's fault, not the archive's. What is
    in `into` then is for the caller to remove.
    """
    limit = max(SMALL, MAX_GROWTH * archive.stat().st_size)
    into.mkdir(parents=True, exist_ok=True)
    read = {"zip": zip_members, "tar": tar_members, "tar.gz": tar_members}.get(kind(archive))
    if read is None:
        raise UsageError(f"{archive}: neither a zip nor a tar archive")
    declared = count = 0
    seen: set[str] = set()
    with (
        open(archive, "rb") as file,
        closing(read(file, archive, limit)) as members,
        tqdm(desc=f"unpack {archive.name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for member in sound(archive, members):
            name = member.name
            count, declared = count + 1, declared + member.size
            reason = refusal(member)
            if not reason and count > MAX_MEMBERS:
                reason = f"more than {MAX_MEMBERS:,} members"
            if not reason and declared > limit:
                reason = f"with it the archive unpacks to more than {limit:,} bytes, {MAX_GROWTH} times its size"
            path = PurePosixPath(name)
            # Macs and Windows take names that differ in case, or in how an accent is written, for one.
            same = unicodedata.normalize("NFC", str(path)).casefold()
            if not reason and not member.folder and same in seen:
                reason = "twice in the archive, or twice but for upper and lower case"
            if reason:
                raise UsageError(f"{archive}: refused because of {name!r}: {reason}")
            if member.folder or any(map(is_ignored, path.parts)):
                continue
            seen.add(same)
            target = into / path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                written = open(target, "xb")  # noqa: SIM115
            except CLASHES as error:
                raise damaged(archive, name, error) from error
            with written:
                for chunk in sound(archive, chunks(member), name):
                    written.write(chunk)
                    bar.update(len(chunk))


def sound(archive: Path, items: Iterable[T], name: str = "") -> Iterator[T]:
    """`items`, read from `archive`; whatever reading them raises is told as damage, at the member `name`."""
    try:
        for item in items:
            yield item
            name = item.name if isinstance(item, Member) else name
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # damaged archives make their readers raise almost anything
        raise damaged(archive, name, error) from error


def damaged(archive: Path, name: str, error: Exception) -> UsageError:
    where = f" at {name!r}" if name else ""
    return UsageError(f"{archive}: damaged, or not what its name says{where}: {error}")


def chunks(member: Member) -> Iterator[bytes]:
    """The bytes of a file, just as many as it says."""
    left = member.size
    with member.open() as source:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise EOFError(f"more than the {member.size:,} bytes that it says")
            yield chunk
    if left:
        raise EOFError(f"{member.size - left:,} of {member.size:,} bytes")


def unpacked_size(archive: Path) -> int:
    """Bytes that a zip says it holds; of a tar only what it must hold at least."""
    if kind(archive) == "zip":
        with suppress(Exception), zipfile.ZipFile(archive) as file:  # `unpack` tells what is wrong
            return sum(info.file_size for info in file.infolist())
    return archive.stat().st_size


def refusal(member: Member) -> str:
    """Why a member is refused by itself; empty: it is not."""
    name = member.name
    if member.odd:
        return member.odd
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path that leaves the folder"
    if "\\" in name or "\0" in name:
        return "a backslash or a null in the path"
    return ""


def zip_members(file: BinaryIO, _archive: Path, _limit: int) -> Generator[Member, None, None]:
    with zipfile.ZipFile(file) as opened:
        for info in opened.infolist():
            mode = info.external_attr >> 16
            odd = "a link" if stat.S_ISLNK(mode) else "a device" if stat.S_IFMT(mode) not in KNOWN_TYPES else ""
            odd = "encrypted" if info.flag_bits & 1 else odd
            # `orig_filename`: `filename` is cut at a null, and on Windows its backslashes are turned.
            yield Member(info.orig_filename, info.file_size, info.is_dir(), odd, partial(opened.open, info))


def tar_members(file: BinaryIO, archive: Path, limit: int) -> Generator[Member, None, None]:
    with gzip.open(file) if kind(archive) == "tar.gz" else file as opened:
        stream = Counted(cast(BinaryIO, opened), archive, limit)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            while (info := tar.next()) is not None:
                setattr(tar, "members", [])  # noqa: B010  tarfile would keep all that it has seen
                odd = "a link" if info.issym() or info.islnk() else "" if info.isreg() or info.isdir() else "a device"
                content = cast(Callable[[], IO[bytes]], partial(tar.extractfile, info))
                yield Member(info.name, info.size, info.isdir(), odd, content)
            # tarfile takes the end of the file, and a header that it cannot read, for the end of the archive.
            if stream.last != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends before its end")
        while stream.read(CHUNK):  # on to the checksum of the gzip stream
            pass


class Counted:
    """A stream that tarfile reads: bounded in all, and in each read, for headers can be bombs too."""

    def __init__(self, file: BinaryIO, archive: Path, limit: int) -> None:
        self.file, self.archive, self.limit = file, archive, limit
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL or self.file.tell() > 2 * self.limit:  # twice: headers and padding come on top
            raise UsageError(f"{self.archive}: refused: a header, or the whole, unpacks to too much")
        self.last = self.file.read(size)
        return self.last

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()
