"""Makes prepared images: one ordered pass over the files of each environment, resumed where it was stopped.

`index` describes the files. While an environment is written, its index is `<domain>.csv.partial`, and never tells of
views that are not on disk; the rename to `<domain>.csv` commits it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from domainbed_hp.datasets.folder import FolderImages, find_images
from domainbed_hp.datasets.loading.prefetch import Workers
from domainbed_hp.datasets.prepared.encode import encode
from domainbed_hp.datasets.prepared.index import (
    About,
    Entry,
    append_index,
    copy_index,
    open_index,
    prepared_folder,
    read_about,
    read_index,
    write_about,
)
from domainbed_hp.datasets.prepared.reader import stamped
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import UsageError

RAW_LIMIT = 32 * 10**9
"""Bytes above which `auto` compresses."""
SAMPLE = 16
"""Images per environment from which sizes are estimated."""
SYNC_EVERY = 256
"""Images between two points from which an interrupted run resumes."""

amount = partial(tqdm.format_sizeof, suffix="B", divisor=1000)


@dataclass
class Kept:
    """The leading images of an environment whose views are there already."""

    mtimes_ns: array[int] = field(default_factory=lambda: array("q"))
    end: int = 0
    """Bytes of their views."""
    touched: bool = False
    """Whether the index has other times: the same bytes, copied anew."""
    whole: bool = False
    """Whether these are all the images, and nothing else is there."""


@dataclass
class Environment:
    """One environment: its image files, and the files that are made of them."""

    source: Path
    images: FolderImages
    folder: Path
    kept: Kept = field(default_factory=Kept)
    status: str = "up to date"

    @property
    def domain(self) -> str:
        return self.source.name

    @property
    def data(self) -> Path:
        return self.folder / f"{self.domain}.bin"

    @property
    def index(self) -> Path:
        return self.folder / f"{self.domain}.csv"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.domain}.csv.partial"


def prepare(
    spec: DatasetSpec,
    data_dir: Path,
    size: int,
    resize: str = "crop",
    interpolation: str = "bicubic",
    *,
    encoding: str = "auto",
    on_error: str = "stop",
    num_workers: int = 0,
) -> Path:
    """Bring the prepared folder of a data set up to date with its image files, and return it.

    A file counts as the one that was prepared if size and modification time are the same, or else if its digest is;
    one that was left out stays so until it changes. `auto` keeps the encoding that a folder has. Memory: the list of
    the files, and a few images per worker.
    """
    if spec.build is not None:
        raise UsageError(f"{spec.name} is made, not read from image files: there is nothing to prepare")
    if size < 1 or num_workers < 0:
        raise UsageError(f"image_size and num_workers: got {size} and {num_workers}, expected at least 1 and 0")
    root = data_dir / spec.folder
    found = find_images(spec, root)
    folder = prepared_folder(spec, data_dir, size, resize, interpolation)
    environments = [Environment(root / domain, images, folder) for domain, images in found.environments.items()]
    about = About(spec.name, found.class_names, spec.domain_folders, size, resize, interpolation, encoding)
    try:
        with locked(folder), Workers(num_workers) as workers:
            before = read_about(folder)
            if before is None or encoding not in ("auto", before.encoding):
                clear(folder)
            else:
                about = replace(about, encoding=before.encoding)
            for environment in environments:
                keep(environment)
            waiting = [environment for environment in environments if not environment.kept.whole]
            if waiting:
                about = plan(environments, about, workers)
            if about != before:
                write_about(folder, about)
            for environment in waiting:
                write(environment, about, on_error, workers)
            clear(folder, {path for environment in environments for path in (environment.data, environment.index)})
    except OSError as error:
        # What was not yet synced is lost.
        advice = "Put this right and run again; it goes on from where it last saved."
        raise UsageError(f"{error.filename or folder}: {error.strerror}. {advice}") from error
    print(f"{folder}, {about.encoding}")
    for environment in environments:
        print(summary(environment))
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One `prepare` of a folder at a time; a second one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another prepare of {folder}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file, but a released lock itself
            os.unlink(lock.lock_file)
        lock.release()


def clear(folder: Path, but: Collection[Path] = ()) -> None:
    """Remove what other encodings, other environments and killed runs left."""
    for path in folder.iterdir():
        if path.suffix in (".csv", ".bin", ".partial", ".tmp") and path not in but:
            path.unlink()


def keep(environment: Environment) -> None:
    """Find what can be kept; a complete environment whose source has changed is removed."""
    complete = environment.index.exists()
    environment.kept = kept = compare(environment, environment.index if complete else environment.partial)
    if not complete:
        kept.whole = False
    elif not kept.whole:
        environment.index.unlink()
        environment.kept = kept = Kept()
    elif kept.touched:
        copy_index(environment.index, environment.index, kept.mtimes_ns)
        environment.status = "same images, other times: index renewed"
    if not kept.mtimes_ns:
        # Removed, not overwritten: a run may be reading it.
        environment.data.unlink(missing_ok=True)


def compare(environment: Environment, index: Path) -> Kept:
    """The longest beginning of an index that the image files and the data bear out."""
    kept = Kept()
    if not index.exists() or not environment.data.exists():
        return kept
    room = environment.data.stat().st_size
    images, entries = environment.images, read_index(index)
    with tqdm(images.paths, f"{environment.domain}: compare", leave=False, disable=None) as bar:
        # Entries last: zip must not take one more of them than there are images.
        for path, (*source, mtime_ns), entry in zip(bar, stamped(environment.source, images), entries, strict=False):
            if tuple(source) != entry[:3] or entry.end > room:
                break
            if mtime_ns != entry.mtime_ns:
                if digest(path) != entry.sha256:
                    break
                kept.touched = True
            kept.mtimes_ns.append(mtime_ns)
            kept.end = entry.end
    kept.whole = len(kept.mtimes_ns) == len(images) and next(entries, None) is None and kept.end == room
    return kept


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan(environments: list[Environment], about: About, workers: Workers) -> About:
    """Choose the encoding where it is open, and refuse what would not fit on the disk."""
    auto = about.encoding == "auto"
    about = replace(about, encoding="raw") if auto else about
    sizes = estimate(environments, about, workers)
    if auto:
        count, raw = sum(len(environment.images) for environment in environments), sum(sizes)
        encoding, where = ("compressed", "above") if raw > RAW_LIMIT else ("raw", "within")
        print(f"{about.dataset}: {count:,} images, about {amount(raw)} raw, {where} {amount(RAW_LIMIT)}: {encoding}")
        if encoding == "compressed":
            about = replace(about, encoding=encoding)
            sizes = estimate(environments, about, workers)
    pairs = [(size, environment.kept) for size, environment in zip(sizes, environments, strict=True)]
    needed = sum(max(0, size - kept.end) for size, kept in pairs if not kept.whole)
    folder = environments[0].folder
    if needed > (free := shutil.disk_usage(folder).free):
        advice = "" if about.encoding == "compressed" else ", or pass --encoding compressed"
        raise UsageError(f"{folder}: about {amount(needed)} to write, {amount(free)} free. Make room{advice}")
    return about


def estimate(environments: list[Environment], about: About, workers: Workers) -> list[float]:
    """Bytes of each environment's data, from a sample spread over its images."""
    sizes = []
    for environment in environments:
        indices = range(0, len(environment.images), max(1, len(environment.images) // SAMPLE))
        encoded = workers.map(partial(encode, environment.source, environment.images, about, "skip"), indices)
        found = [entry.end for entry, _ in encoded if not entry.error]
        sizes.append(float(np.mean(found)) * len(environment.images) if found else 0.0)
    return sizes


def write(environment: Environment, about: About, on_error: str, workers: Workers) -> None:
    """Append the images that are missing, and commit."""
    start, end = len(environment.kept.mtimes_ns), environment.kept.end
    environment.status = f"resumed after {start:,} images" if start else "new"
    copy_index(environment.partial, environment.partial, environment.kept.mtimes_ns)
    with (
        open(environment.data, "ab") as data,
        open_index(environment.partial, "a") as index,
        tqdm(None, environment.domain, len(environment.images), unit="image", initial=start, disable=None) as bar,
    ):
        data.truncate(end)
        waiting: list[Entry] = []

        def sync() -> None:
            data.flush()
            os.fsync(data.fileno())
            append_index(index, waiting)
            waiting.clear()

        make = partial(encode, environment.source, environment.images, about, on_error)
        try:
            for entry, views in workers.map(make, range(start, len(environment.images))):
                data.writelines(views)
                waiting.append(entry._replace(offset=end))
                end = waiting[-1].end
                bar.update()
                if len(waiting) == SYNC_EVERY:
                    sync()
        finally:
            sync()
        os.fsync(index.fileno())
    filled = {entry.label for entry in read_index(environment.partial) if not entry.error}
    if empty := [name for label, name in enumerate(about.class_names) if label not in filled]:
        folders = ", ".join(str(environment.source / name) for name in empty)
        raise UsageError(f"no image that can be decoded in {folders}. Copy them again.")
    os.replace(environment.partial, environment.index)


def summary(environment: Environment) -> str:
    """What the index of an environment says, in one line."""
    images = skipped = end = 0
    for entry in read_index(environment.index):
        images, skipped, end = images + (not entry.error), skipped + bool(entry.error), entry.end
    return f"  {environment.domain}: {images:,} images, {amount(end)}, {skipped} skipped ({environment.status})"
