"""The files of a prepared folder.

Beside the folder of a data set lies `prepared/<folder>-<size>-<resize>-<interpolation>/` with `about.json` and, per
environment, `<domain>.bin`, the images one after another, and `<domain>.csv`, the index. An index is there once its
environment is complete. An image is its training view and then its evaluation view, of `views`: uint8 (h, w, 3) and
(3, S, S) as they are (raw: the pixels of an unprepared run), or compressed: as JPEG and as lossless WebP.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from domainbed_hp.datasets.spec import DatasetSpec

FORMAT = 1
"""Of the files, and of the pixels in them: a change of `views` is another format."""
ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class About:
    """What all environments of a prepared folder share."""

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

    `height` and `width` are the training view's. An image that could not be decoded has an `error` and no bytes.
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


def prepared_folder(spec: DatasetSpec, data_dir: Path, size: int, resize: str, interpolation: str) -> Path:
    root = (data_dir / spec.folder).absolute()
    return root.parent / "prepared" / f"{root.name}-{size}-{resize}-{interpolation}"


def read_about(folder: Path) -> About | None:
    """None where there is none, or one of another format."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about = About(**found | {key: tuple(found[key]) for key in ("class_names", "domains")})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return about if about.format == FORMAT else None


def write_about(folder: Path, about: About) -> None:
    temporary = folder / f"{ABOUT}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(about), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / ABOUT)


def relative(folder: Path, path: str) -> str:
    """The path of an image as an `Entry` has it."""
    return path[len(str(folder)) + 1 :].replace(os.sep, "/")


def open_index(path: Path, mode: str) -> IO[str]:
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="\n")


def read_index(path: Path) -> Iterator[Entry]:
    """The entries as far as whole lines go: a writer may have been killed in the middle of one."""
    with open_index(path, "r") as file:
        lines = csv.reader(line for line in file if line.endswith("\n"))
        try:
            if next(lines, None) != list(Entry._fields):
                return
            for (
                name,
                label,
                source_bytes,
                mtime_ns,
                sha256,
                offset,
                height,
                width,
                training,
                evaluation,
                error,
            ) in lines:
                source = name, int(label), int(source_bytes), int(mtime_ns), sha256
                yield Entry(*source, int(offset), int(height), int(width), int(training), int(evaluation), error)
        except (ValueError, csv.Error):
            return


def copy_index(old: Path, new: Path, mtimes_ns: array[int]) -> None:
    """The first entries of `old`, with these modification times, become all of `new`, at once."""
    temporary = new.with_name(f"{new.name}.tmp")
    with open_index(temporary, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Entry._fields)
        if mtimes_ns:
            entries = zip(mtimes_ns, read_index(old), strict=False)
            writer.writerows(entry._replace(mtime_ns=mtime_ns) for mtime_ns, entry in entries)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, new)


def append_index(file: IO[str], entries: list[Entry]) -> None:
    csv.writer(file, lineterminator="\n").writerows(entries)
    file.flush()
