"""Read the prepared images of a run; `index` describes their files."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from domainbed_hp.datasets.folder import FolderImages, find_images, print_build
from domainbed_hp.datasets.loading.transforms import to_channels_first
from domainbed_hp.datasets.prepared.index import ABOUT, About, get_prepared_folder, list_sources, read_about, read_index
from domainbed_hp.datasets.spec import Dataset, DatasetSpec
from domainbed_hp.files import sha256_of
from domainbed_hp.registry import UsageError

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

LOCATION = np.dtype([("label", "i8"), ("offset", "i8"), ("shape", "i4", 2), ("bytes", "i4", 2)])
"""The parts of an entry that reading needs, 32 bytes an image: `shape` of the training view, `bytes` of both views."""


class PreparedViews:
    """The `ImageViews` of one environment, read from disk at each access, by any number of threads."""

    def __init__(self, path: Path, locations: np.ndarray, about: About, command: str) -> None:
        self.path, self.locations, self.about, self.command = path, locations, about, command
        self.labels = np.ascontiguousarray(locations["label"])
        end = int(locations[-1]["offset"] + locations[-1]["bytes"].sum()) if len(locations) else 0
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
            # Mapped only where there is no pread: touched pages count as memory of the run, and grow with the data.
            self.mapped = None if hasattr(os, "pread") else np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise self._make_error(str(error.strerror)) from error
        if (size := os.fstat(self.file.fileno()).st_size) != end:
            raise self._make_error(f"it has {size} bytes, expected {end}")

    def __len__(self) -> int:
        return len(self.locations)

    def load_training_view(self, i: int) -> np.ndarray:
        at = self.locations[i]
        data = self._read(at["offset"], at["bytes"][0])
        if self.about.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(*at["shape"], 3)
        return np.asarray(Image.open(io.BytesIO(data)))

    def load_evaluation_view(self, i: int) -> np.ndarray:
        at = self.locations[i]
        data = self._read(at["offset"] + at["bytes"][0], at["bytes"][1])
        if self.about.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(3, self.about.size, self.about.size)
        return to_channels_first(Image.open(io.BytesIO(data)))

    def fingerprint(self) -> str:
        """Return the digest of the index, which holds the digest of every image file."""
        return sha256_of(self.path.with_suffix(".csv"))

    def _read(self, offset: int, size: int) -> bytes:
        if self.mapped is not None:
            return self.mapped[offset : offset + size].tobytes()
        data = os.pread(self.file.fileno(), size, offset)
        if len(data) < size:
            raise self._make_error(f"it ends at byte {offset + len(data)}, expected {size} from {offset}")
        return data

    def _make_error(self, problem: str) -> UsageError:
        return UsageError(f"{self.path} does not fit its index: {problem}. Copy it again, or run: {self.command}")


class Stale(Exception):
    """A prepared folder does not fit its source; the message names the difference."""


def open_prepared(spec: DatasetSpec, data_dir: Path, preprocess: Preprocess) -> Dataset | None:
    """Open the prepared images of `spec` for `preprocess`; None, with a line on stderr, if they are out of date.

    Names, sizes and modification times of the source are compared, as by rsync. Without a source folder nothing is
    compared, so that a machine needs the prepared folder alone.
    """
    size, resize, interpolation = preprocess.size, preprocess.resize, preprocess.interpolation
    folder = get_prepared_folder(spec, data_dir, size, resize, interpolation)
    if not (folder / ABOUT).exists():
        return None
    words = ["--data_dir", str(data_dir), "--dataset", spec.name, "--image_size", str(size)]
    words += ["--resize", resize, "--interpolation", interpolation]
    command = shlex.join(["python", "-m", "domainbed_hp.scripts.prepare", *words])
    try:
        return read_prepared(spec, data_dir / spec.folder, folder, command)
    except Stale as stale:
        print(f"{folder} is out of date and not used: {stale}. Renew it: {command}", file=sys.stderr)
        return None


def read_prepared(spec: DatasetSpec, root: Path, folder: Path, command: str) -> Dataset:
    """Open the prepared `folder` of the data set in `root`; `Stale` where they do not fit."""
    source = find_images(spec, root) if root.is_dir() else None
    about = read_about(folder)
    if about is None:
        raise Stale("another version of the package wrote it")
    names = source.class_names if source else spec.class_names or about.class_names
    if (about.class_names, about.domains) != (names, spec.domain_folders) or len(names) != spec.num_classes:
        raise Stale("it has other environments or classes")
    if missing := [domain for domain in about.domains if not (folder / f"{domain}.csv").exists()]:
        raise Stale(f"{', '.join(missing)} not complete")
    changes: list[str] = []
    locations = {}
    for domain in about.domains:
        images = source.environments[domain] if source else None
        locations[domain] = locate_views(folder / f"{domain}.csv", root / domain, images, changes)
    if changes:
        raise Stale(changes[0] + (f", and {len(changes) - 1} more differ" if len(changes) > 1 else ""))
    good = {domain: array[array["bytes"][:, 0] > 0] for domain, array in locations.items()}
    environments = [PreparedViews(folder / f"{domain}.bin", good[domain], about, command) for domain in good]
    if skipped := sum(map(len, locations.values())) - sum(map(len, environments)):
        print(f"{folder} leaves out {skipped} images with errors; its .csv files name them", file=sys.stderr)
    print_build(spec, folder, tuple(map(len, environments)))
    return Dataset(spec, names, [*environments], f"prepared, {about.encoding}")


def locate_views(index: Path, source: Path, images: FolderImages | None, changes: list[str]) -> np.ndarray:
    """Return the `LOCATION` of every entry; add a line to `changes` for every file of `images` that differs from it.

    `images` are the files in the folder `source`; without them nothing is compared.
    """
    current = {path: rest for path, *rest in list_sources(source, images)} if images else {}
    lines: dict[str, str] = {}

    def compare_entries() -> Iterator[Any]:
        for entry in read_index(index):
            if images and (now := current.pop(entry.path, None)) != [*entry[1:4]]:
                lines[entry.path] = "has changed" if now else "is gone"
            yield entry.label, entry.offset, entry[6:8], entry[8:10]

    locations = np.fromiter(compare_entries(), LOCATION)
    lines |= dict.fromkeys(current, "is new")
    changes += [f"{source / path} {line}" for path, line in sorted(lines.items())]
    return locations
