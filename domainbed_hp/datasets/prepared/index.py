"""The files of a prepared folder, `prepared/<folder>-<size>-<resize>-<interpolation>/` next to the data set's folder.

It holds `about.json` and, for every environment, the images one after another in `<domain>.bin`, and their index in
`<domain>.csv`, which is named `<domain>.csv.partial` as long as it is incomplete. An image is its training view and
then its evaluation view: uint8 (h, w, 3) and (3, S, S) in encoding `raw`, a JPEG and a lossless WebP in `compressed`.
"""

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, get_type_hints

from domainbed_hp.datasets.folder import FolderImages
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.files import replace_atomically

FORMAT = 1
"""Version of the files and of the pixels in them: a change in how views are made needs another number."""
ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class About:
    """The contents of `about.json`: facts of all environments of a prepared folder."""

    dataset: str
    class_names: tuple[str, ...]
    domains: tuple[str, ...]
    size: int
    resize: str
    interpolation: str
    encoding: str
    format: int = FORMAT


class Entry(NamedTuple):
    """One line of an index, in ImageFolder's order; `path` is relative to the environment, with slashes.

    `height` and `width` are those of the training view. An image that cannot be decoded has an `error` and no bytes.
    """

    path: str
    label: int
    source_bytes: int
    mtime_ns: int
    sha256: str
    offset: int
    height: int
    width: int
    training_bytes: int
    evaluation_bytes: int
    error: str

    @property
    def end(self) -> int:
        return self.offset + self.training_bytes + self.evaluation_bytes


def get_prepared_folder(spec: DatasetSpec, data_dir: Path, size: int, resize: str, interpolation: str) -> Path:
    root = (data_dir / spec.folder).absolute()
    return root.parent / "prepared" / f"{root.name}-{size}-{resize}-{interpolation}"


def read_about(folder: Path) -> About | None:
    """Return the contents of `about.json`; None for a missing file and for another format."""
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about = About(**values | {key: tuple(values[key]) for key in ("class_names", "domains")})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return about if about.format == FORMAT else None


def write_about(folder: Path, about: About) -> None:
    with replace_atomically(folder / ABOUT) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(about), indent=1) + "\n", encoding="utf-8")


def list_sources(folder: Path, images: FolderImages) -> Iterator[tuple[str, int, int, int]]:
    """Yield the first four fields of the `Entry` of every image file; a broken link has size and time -1."""
    for path, label in zip(images.paths, images.labels.tolist(), strict=True):
        try:
            status = os.stat(path)
        except OSError:
            yield make_entry_path(folder, path), label, -1, -1
        else:
            yield make_entry_path(folder, path), label, status.st_size, status.st_mtime_ns


def make_entry_path(folder: Path, path: str) -> str:
    """Return the path of an image in the environment `folder` as an `Entry` has it."""
    return path[len(str(folder)) + 1 :].replace(os.sep, "/")


def open_index(path: Path, mode: str) -> IO[str]:
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="\n")


def read_index(path: Path) -> Iterator[Entry]:
    """Yield the entries as far as the lines are whole: a killed process may leave half a line at the end."""
    types = tuple(get_type_hints(Entry).values())
    with contextlib.suppress(FileNotFoundError, ValueError, csv.Error), open_index(path, "r") as file:
        rows = csv.reader(line for line in file if line.endswith("\n"))
        if next(rows, None) == list(Entry._fields):
            for row in rows:
                yield Entry(*(convert(text) for convert, text in zip(types, row, strict=True)))


def append_entries(file: IO[str], entries: Iterable[Entry]) -> None:
    csv.writer(file, lineterminator="\n").writerows(entries)
    file.flush()


def copy_index(old: Path, new: Path, mtimes_ns: Iterable[int]) -> None:
    """Replace `new` by the first entries of `old`, one for each of the new modification times."""
    with replace_atomically(new) as temporary, open_index(temporary, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Entry._fields)
        pairs = zip(mtimes_ns, read_index(old), strict=False)
        writer.writerows(entry._replace(mtime_ns=mtime_ns) for mtime_ns, entry in pairs)
