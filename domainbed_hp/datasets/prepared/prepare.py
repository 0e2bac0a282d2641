"""Make prepared images: one ordered pass over the files of every environment, resumed where it was stopped.

`index` describes the files. An index lists only views that are on disk; its rename completes the environment.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from array import array
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from domainbed_hp.datasets.folder import FolderImages, decode_image, find_images
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.loading.transforms import make_evaluation_view, make_training_view
from domainbed_hp.datasets.prepared import index
from domainbed_hp.datasets.prepared.index import About, Entry
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.files import hold_lock, sha256_of
from domainbed_hp.registry import UsageError

RAW_LIMIT = 32 * 10**9
"""Number of bytes above which encoding `auto` compresses."""
SAMPLE = 16
"""Number of images from which the size of an environment is estimated."""
SYNC_EVERY = 256
"""Number of images between two points from which an interrupted run resumes."""

format_bytes = partial(tqdm.format_sizeof, suffix="B", divisor=1000)


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

    A file is unchanged if its size and modification time are, or else its digest. An image with an error is left out
    until its file changes. Encoding `auto` is that of an existing folder, and in a new one depends on the size.
    """
    if spec.build is not None:
        raise UsageError(f"{spec.name} is made, not read from image files: there is nothing to prepare")
    if size < 1 or num_workers < 0:
        raise UsageError(f"image_size and num_workers: got {size} and {num_workers}, expected at least 1 and 0")
    root = data_dir / spec.folder
    contents = find_images(spec, root)
    folder = index.get_prepared_folder(spec, data_dir, size, resize, interpolation)
    about = About(spec.name, contents.class_names, spec.domain_folders, size, resize, interpolation, encoding)
    environments = [Environment(root / domain, images, folder) for domain, images in contents.environments.items()]
    try:
        message = f"waiting for another prepare of {folder}"
        with hold_lock(folder / "lock", message), ThreadPool(num_workers) as threads:
            before = index.read_about(folder)
            if before and encoding in ("auto", before.encoding):
                about = replace(about, encoding=before.encoding)
            else:
                remove_files(folder)
            for environment in environments:
                environment.find_unchanged()
            incomplete = [environment for environment in environments if not environment.complete]
            if incomplete:
                about = choose_encoding(environments, about, threads)
            if about != before:
                index.write_about(folder, about)
            for environment in incomplete:
                environment.write_views(about, on_error, threads)
            remove_files(folder, {path for e in environments for path in (e.data, e.index)})
    except OSError as error:
        advice = "Correct this and run again; it goes on from where it last saved."
        raise UsageError(f"{error.filename or folder}: {error.strerror}. {advice}") from error
    print("\n".join([f"{folder}, {about.encoding}", *(environment.describe() for environment in environments)]))
    return folder


def remove_files(folder: Path, but: Collection[Path] = ()) -> None:
    """Remove the files of other encodings, of other environments and of killed runs."""
    for path in folder.iterdir():
        if path.suffix in (".csv", ".bin", ".partial", ".tmp") and path not in but:
            path.unlink()


def choose_encoding(environments: list[Environment], about: About, threads: ThreadPool) -> About:
    """Choose the encoding if it is `auto`; `UsageError` if the missing views do not fit on the disk."""
    if about.encoding == "auto":
        count = sum(len(e.images) for e in environments)
        raw = sum(e.estimate_size(replace(about, encoding="raw"), threads) for e in environments)
        encoding, where = ("compressed", "above") if raw > RAW_LIMIT else ("raw", "within")
        size, limit = format_bytes(raw), format_bytes(RAW_LIMIT)
        print(f"{about.dataset}: {count:,} images, about {size} raw, {where} the limit of {limit}: {encoding}")
        about = replace(about, encoding=encoding)
    needed = sum(max(0, e.estimate_size(about, threads) - e.end) for e in environments if not e.complete)
    folder = environments[0].data.parent
    if needed > (free := shutil.disk_usage(folder).free):
        advice = "" if about.encoding == "compressed" else ", or pass --encoding compressed"
        space = f"about {format_bytes(needed)} to write, {format_bytes(free)} free"
        raise UsageError(f"{folder}: {space}. Make room{advice}")
    return about


class Environment:
    """One environment: its image files, and the files that are made of them."""

    def __init__(self, source: Path, images: FolderImages, folder: Path) -> None:
        self.source, self.images, self.name = source, images, source.name
        self.data, self.index = folder / f"{self.name}.bin", folder / f"{self.name}.csv"
        self.partial = folder / f"{self.name}.csv.partial"
        self.complete, self.status = False, "up to date"
        self.mtimes_ns = array("q")
        """Modification times of the leading images whose stored views are still right."""
        self.end = 0
        """Number of bytes of these views."""

    def find_unchanged(self) -> None:
        """Count the leading images whose views are still right; discard a complete environment if a file changed."""
        path = self.index if self.index.exists() else self.partial
        size = self.data.stat().st_size if self.data.exists() else 0
        sources, entries = index.list_sources(self.source, self.images), index.read_index(path)
        renewed = False
        with tqdm(self.images.paths, f"{self.name}: compare", leave=False, disable=None) as bar:
            # Entries last, since zip must take none of them beyond the last image.
            for image, (*source, mtime_ns), entry in zip(bar, sources, entries, strict=False):
                if tuple(source) != entry[:3] or entry.end > size:
                    break
                if mtime_ns != entry.mtime_ns:
                    if sha256_of(Path(image)) != entry.sha256:
                        break
                    renewed = True
                self.mtimes_ns.append(mtime_ns)
                self.end = entry.end
        if path == self.index:
            whole = len(self.mtimes_ns) == len(self.images) and next(entries, None) is None
            self.complete = whole and self.end == size
            if not self.complete:
                path.unlink()
                self.mtimes_ns, self.end = array("q"), 0
            elif renewed:
                index.copy_index(path, path, self.mtimes_ns)
                self.status = "same images, other times: index renewed"
        if not self.mtimes_ns:
            self.data.unlink(missing_ok=True)  # not overwritten: a run may be reading it

    def estimate_size(self, about: About, threads: ThreadPool) -> float:
        """Return the number of bytes of all views, from a sample spread over the images."""
        count = len(self.images)
        sample = range(0, count, max(1, count // SAMPLE))
        ends = [e.end for e, _ in threads.map(partial(self.encode_image, about, "skip"), sample) if not e.error]
        return float(np.mean(ends)) * count if ends else 0.0

    def write_views(self, about: About, on_error: str, threads: ThreadPool) -> None:
        """Append the views of the images that are missing, and complete the environment."""
        start, end, count = len(self.mtimes_ns), self.end, len(self.images)
        self.status = f"resumed after {start:,} images" if start else "new"
        index.copy_index(self.partial, self.partial, self.mtimes_ns)
        with (
            open(self.data, "ab") as data,
            index.open_index(self.partial, "a") as lines,
            tqdm(None, self.name, count, unit="image", initial=start, disable=None) as bar,
        ):
            data.truncate(end)
            entries: list[Entry] = []

            def sync() -> None:
                data.flush()
                os.fsync(data.fileno())
                index.append_entries(lines, entries)
                entries.clear()

            try:
                for entry, views in threads.map(partial(self.encode_image, about, on_error), range(start, count)):
                    data.writelines(views)
                    entries.append(entry._replace(offset=end))
                    end = entries[-1].end
                    bar.update()
                    if len(entries) == SYNC_EVERY:
                        sync()
            finally:
                sync()
            os.fsync(lines.fileno())
        labels = {entry.label for entry in index.read_index(self.partial) if not entry.error}
        if empty := [str(self.source / name) for label, name in enumerate(about.class_names) if label not in labels]:
            raise UsageError(f"no image that can be decoded in {', '.join(empty)}. Copy them again.")
        os.replace(self.partial, self.index)

    def encode_image(self, about: About, on_error: str, i: int) -> tuple[Entry, list[bytes]]:
        """Return the entry of image i with offset 0, and its two views as they are stored.

        An image that cannot be decoded is a `UsageError`, or with `on_error` skip an entry with an error and no views.
        """
        path = self.images.paths[i]
        try:
            with open(path, "rb") as file:
                data, mtime_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise UsageError(f"{path}: cannot read this file ({error.strerror}). Copy it again.") from error
        source = index.make_entry_path(self.source, path), int(self.images.labels[i]), len(data), mtime_ns
        digest = hashlib.sha256(data).hexdigest()
        image, problem = decode_image(data)
        if image is None:
            if on_error == "stop":
                advice = "Copy it again, or pass --on_error skip to leave out and record such images."
                raise UsageError(f"{path}: cannot decode this image ({problem}). {advice}")
            return Entry(*source, digest, 0, 0, 0, 0, 0, problem), []
        training = make_training_view(image, about.size, about.interpolation)
        evaluation = make_evaluation_view(image, about.size, about.resize, about.interpolation)
        if about.encoding == "raw":
            views = [training.tobytes(), evaluation.tobytes()]
        else:
            # Without chroma subsampling: drawings and sketches show it. Lossless where a model answers: from a JPEG, 7
            # in 1,000 answers of a small CLIP on PACS differ.
            views = [compress(training, "jpeg", quality=95, subsampling="4:4:4")]
            views += [compress(evaluation.transpose(1, 2, 0), "webp", lossless=True, method=0)]
        height, width, _ = training.shape
        return Entry(*source, digest, 0, height, width, len(views[0]), len(views[1]), ""), views

    def describe(self) -> str:
        """Return a line on the contents of the index."""
        images = skipped = 0
        for entry in index.read_index(self.index):
            images, skipped, end = images + (not entry.error), skipped + bool(entry.error), entry.end
        return f"  {self.name}: {images:,} images, {format_bytes(end)}, {skipped} skipped ({self.status})"


def compress(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format, **options)
    return file.getvalue()
