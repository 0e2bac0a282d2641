"""How a run reads prepared images; `index` describes their files."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from domainbed_hp.datasets.folder import FolderImages, Found, find_images, say_build
from domainbed_hp.datasets.loading.transforms import channels_first
from domainbed_hp.datasets.prepared.index import ABOUT, About, Entry, prepared_folder, read_about, read_index, relative
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import UsageError

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

PLACE = np.dtype([("label", "i8"), ("offset", "i8"), ("shape", "i4", 2), ("bytes", "i4", 2)])
"""What reading needs of an entry: shape of the training view, bytes of both views; 32 bytes an image."""


class PreparedViews:
    """The `Views` of one environment, read at each access, by any number of threads."""

    def __init__(self, path: Path, places: np.ndarray, about: About, command: str) -> None:
        self.path, self.places, self.about, self.command = path, places, about, command
        self.labels = np.ascontiguousarray(places["label"])
        end = int(places[-1]["offset"] + places[-1]["bytes"].sum()) if len(places) else 0
        try:
            # Not mapped where it can be helped: touched pages count as memory of the run, and grow with the data.
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
            self.mapped = None if hasattr(os, "pread") else np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise self.damaged(str(error.strerror)) from error
        if (size := os.fstat(self.file.fileno()).st_size) != end:
            raise self.damaged(f"it has {size} bytes, expected {end}")

    def __len__(self) -> int:
        return len(self.places)

    def training(self, i: int) -> np.ndarray:
        place = self.places[i]
        data = self.read(place["offset"], place["bytes"][0])
        if self.about.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(*place["shape"], 3)
        return np.asarray(Image.open(io.BytesIO(data)))

    def evaluation(self, i: int) -> np.ndarray:
        place = self.places[i]
        data = self.read(place["offset"] + place["bytes"][0], place["bytes"][1])
        if self.about.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(3, self.about.size, self.about.size)
        return channels_first(Image.open(io.BytesIO(data)))

    def fingerprint(self) -> str:
        """Of the index, which has the digest of every image file."""
        with open(self.path.with_suffix(".csv"), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        if self.mapped is not None:
            return self.mapped[offset : offset + size].tobytes()
        data = os.pread(self.file.fileno(), size, offset)
        if len(data) < size:
            raise self.damaged(f"it ends at byte {offset + len(data)}, expected {size} from {offset}")
        return data

    def damaged(self, problem: str) -> UsageError:
        return UsageError(f"{self.path} does not fit its index: {problem}. Copy it again, or run: {self.command}")


@dataclass(frozen=True)
class Prepared:
    """An opened prepared folder; `skipped` images could not be decoded and are left out."""

    class_names: tuple[str, ...]
    environments: list[PreparedViews]
    encoding: str
    folder: Path
    skipped: int

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.environments))


class Stale(Exception):
    """What was prepared is not what there is to prepare."""


def open_prepared(spec: DatasetSpec, data_dir: Path, preprocess: Preprocess) -> Prepared | None:
    """The prepared images of `spec` for these pixels; None, with a line on stderr, where they are out of date.

    Names, sizes and modification times of the source are compared, as rsync does: a file that was overwritten by one
    of the same size and given its old time back goes unnoticed, here and by `prepare`. Without a source folder nothing
    is compared, so that the prepared folder is all that a machine needs.
    """
    root = data_dir / spec.folder
    folder = prepared_folder(spec, data_dir, preprocess.size, preprocess.resize, preprocess.interpolation)
    command = prepare_command(spec, data_dir, preprocess)
    if not (folder / ABOUT).exists():
        return None
    try:
        prepared = read_prepared(spec, folder, find_images(spec, root) if root.is_dir() else None, root, command)
    except Stale as stale:
        print(f"{folder} is out of date and not used: {stale}. Renew it: {command}", file=sys.stderr)
        return None
    if prepared.skipped:
        print(f"{folder} leaves out {prepared.skipped} images with errors; its .csv files name them", file=sys.stderr)
    say_build(spec, folder, prepared.counts)
    return prepared


def prepare_command(spec: DatasetSpec, data_dir: Path, preprocess: Preprocess) -> str:
    what = ["--data_dir", str(data_dir), "--dataset", spec.name, "--image_size", str(preprocess.size)]
    how = ["--resize", preprocess.resize, "--interpolation", preprocess.interpolation]
    return shlex.join(["python", "-m", "domainbed_hp.scripts.prepare", *what, *how])


def read_prepared(spec: DatasetSpec, folder: Path, found: Found | None, root: Path, command: str) -> Prepared:
    about = read_about(folder)
    if about is None:
        raise Stale("another version wrote it")
    names = found.class_names if found else spec.class_names or about.class_names
    if (about.class_names, about.domains) != (names, spec.domain_folders) or len(names) != spec.num_classes:
        raise Stale("it has other environments or classes")
    if missing := [domain for domain in about.domains if not (folder / f"{domain}.csv").exists()]:
        raise Stale(f"{', '.join(missing)} not complete")
    environments: list[PreparedViews] = []
    changed: list[str] = []
    skipped = 0
    for domain in about.domains:
        index = folder / f"{domain}.csv"
        entries = read_index(index)
        if found:
            entries = unchanged(entries, stamped(root / domain, found.environments[domain]))
        try:
            places = np.fromiter(((e.label, e.offset, e[6:8], e[8:10]) for e in entries), PLACE)
        except Stale:
            assert found
            changed += changes(index, root / domain, found.environments[domain])
            continue
        good = places[places["bytes"][:, 0] > 0]
        skipped += len(places) - len(good)
        environments.append(PreparedViews(folder / f"{domain}.bin", good, about, command))
    if changed:
        raise Stale(changed[0] + (f", and {len(changed) - 1} more differ" if len(changed) > 1 else ""))
    return Prepared(names, environments, about.encoding, folder, skipped)


def stamped(folder: Path, images: FolderImages) -> Iterator[tuple[str, int, int, int]]:
    """Path, label, size and modification time of each image; -1 for a link to nowhere."""
    for path, label in zip(images.paths, images.labels.tolist(), strict=True):
        try:
            status = os.stat(path)
        except OSError:
            yield relative(folder, path), label, -1, -1
        else:
            yield relative(folder, path), label, status.st_size, status.st_mtime_ns


def unchanged(entries: Iterable[Entry], found: Iterable[tuple[str, int, int, int]]) -> Iterator[Entry]:
    """The entries, as long as they tell of what is found; then `Stale`."""
    for entry, source in zip_longest(entries, found):
        if entry is None or entry[:4] != source:
            raise Stale
        yield entry


def changes(index: Path, folder: Path, images: FolderImages) -> list[str]:
    """What became of each image that differs from its entry."""
    before, after = {entry[:4] for entry in read_index(index)}, set(stamped(folder, images))
    was, now = ({path for path, *_ in one - other} for one, other in ((before, after), (after, before)))
    return [
        f"{folder / path} {'has changed' if path in was & now else 'is gone' if path in was else 'is new'}"
        for path in sorted(was | now)
    ]
