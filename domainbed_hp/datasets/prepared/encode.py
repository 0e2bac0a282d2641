"""One image file as the prepared views of it."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from domainbed_hp.datasets.folder import FolderImages
from domainbed_hp.datasets.loading.transforms import evaluation_view, training_view
from domainbed_hp.datasets.prepared.index import About, Entry, relative
from domainbed_hp.registry import UsageError


def encode(folder: Path, images: FolderImages, about: About, on_error: str, i: int) -> tuple[Entry, tuple[bytes, ...]]:
    """The entry of image i of the environment in `folder`, its offset still open, and its views as they are stored.

    An image that cannot be decoded is a `UsageError`, or with `on_error` skip an entry with the error and no views.
    """
    path, label = images.paths[i], int(images.labels[i])
    try:
        with open(path, "rb") as file:
            data, mtime_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        raise UsageError(f"{path}: cannot read this file ({error.strerror}). Copy it again.") from error
    source = relative(folder, path), label, len(data), mtime_ns, hashlib.sha256(data).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise all kinds
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, UnidentifiedImageError):  # which tells an address in memory
            problem = "not an image"
        if on_error == "stop":
            raise UsageError(
                f"{path}: cannot decode this image ({problem}). "
                "Copy it again, or pass --on_error skip to leave out and record such images."
            ) from error
        return Entry(*source, offset=0, height=0, width=0, training_bytes=0, evaluation_bytes=0, error=problem), ()
    training = training_view(image, about.size, about.interpolation)
    evaluation = evaluation_view(image, about.size, about.resize, about.interpolation)
    if about.encoding == "raw":
        views = training.tobytes(), evaluation.tobytes()
    else:
        views = jpeg(training), webp(evaluation.transpose(1, 2, 0))
    height, width, _ = training.shape
    return Entry(*source, 0, height, width, len(views[0]), len(views[1]), error=""), views


def jpeg(pixels: np.ndarray) -> bytes:
    """Without chroma subsampling: drawings and sketches show it."""
    return compressed(pixels, "jpeg", quality=95, subsampling="4:4:4")


def webp(pixels: np.ndarray) -> bytes:
    """Lossless: a model answers as it would to the file. As JPEG, 7 in 1,000 answers of a small CLIP on PACS differ."""
    return compressed(pixels, "webp", lossless=True, method=0)


def compressed(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format, **options)
    return file.getvalue()
