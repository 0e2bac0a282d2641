"""A data set: its facts (`DatasetSpec`), its raw images (`Images`), and the opened data set (`Dataset`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Images(Protocol):
    """The raw images of one environment; `labels` is (N,) int64, an item is an RGB image."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image: ...


class ImageViews(Protocol):
    """The images of one environment as loaders read them; `labels` is (N,) int64."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def load_training_view(self, i: int) -> np.ndarray:
        """Return image i to crop at random from: uint8 (h, w, 3)."""

    def load_evaluation_view(self, i: int) -> np.ndarray:
        """Return image i to score: uint8 (3, S, S), or its features, float32 (E,)."""

    def fingerprint(self) -> str:
        """Return a string that changes when an image or a label changes; "" where changes cannot be noticed."""


class ArrayImages:
    """Images in memory: uint8 array (N, H, W, 3) and labels (N,)."""

    def __init__(self, array: np.ndarray, labels: np.ndarray) -> None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or labels.shape != array.shape[:1]:
            raise ValueError(
                f"got array {array.dtype} {array.shape} and labels {labels.shape}, expected uint8 (N, H, W, 3) and (N,)"
            )
        self.array = array
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.array[i])

    def fingerprint(self) -> str:
        """Return a digest of all pixels and labels."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        for array in (self.array, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Archive:
    """One file of a download; a file that is no zip or tar archive is copied as it is."""

    name: str
    sources: tuple[str, ...]
    """URLs, or `gdrive:<file id>`, in the order in which they are tried."""
    sha256: str = ""
    """The published digest; where it is empty, the first good download records its own."""


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of one data set; tuples with one item per environment are in the order of `environments`.

    The images lie in `data_dir/folder/domain_folders[i]/<class>/<image>`, or `build` makes them.
    """

    name: str
    environments: tuple[str, ...]
    """Labels of the environments, as DomainBed's ENVIRONMENTS."""
    num_classes: int
    class_names: tuple[str, ...] | None = None
    """Names in the order of the labels. None: the sorted names of the class folders."""
    folder: str = ""
    domain_folders: tuple[str, ...] = ()
    image_counts: tuple[int, ...] = ()
    """Images per environment. Empty: not known for certain."""
    build_name: str = ""
    """Name of the build with these counts, if other builds are in circulation."""
    other_builds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> images per environment of other builds, with which published results were made."""
    image_size: int = 224
    """Height and width of x for algorithms without a CLIP tower."""
    steps: int = 5001
    checkpoint_freq: int = 300
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    archives: tuple[Archive, ...] = ()
    arrange: Callable[[Path], None] | None = None
    """Function that sorts the unpacked archives into `domain_folders`, if they have other folders."""
    build: Callable[[], list[Images]] | None = None
    """Function that makes the images of all environments; such a data set needs no `data_dir`."""

    @property
    def builds(self) -> dict[str, tuple[int, ...]]:
        """Name -> images per environment of every known build, the spec's own first."""
        return {self.build_name: self.image_counts, **self.other_builds} if self.image_counts else {}


@dataclass(frozen=True)
class Dataset:
    """An opened data set, with the images of every environment."""

    spec: DatasetSpec
    class_names: tuple[str, ...]
    environments: list[ImageViews]
    source: str
    """The origin of the images in words: made, image files, or prepared."""
