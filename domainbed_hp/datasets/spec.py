"""What a data set is: one `DatasetSpec` of facts, and one `Images` per environment."""

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


class ArrayImages:
    """Images held in memory: uint8 array (N, H, W, 3) and labels (N,)."""

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
        """Of every pixel."""
        found = hashlib.sha256(repr(self.array.shape).encode())
        for array in (self.array, self.labels):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


@dataclass(frozen=True)
class Archive:
    """One file of a download; what is not a zip or tar is kept as it is."""

    name: str
    sources: tuple[str, ...]
    """Tried in this order: URLs, and `gdrive:<file id>`."""
    sha256: str = ""
    """Empty: nobody published one; the first good download records its own."""


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of one data set; per-environment tuples are in the order of `environments`.

    A folder data set lies in `data_dir/folder/domain_folders[i]/<class>/<image>`; one that is made gives `build`.
    """

    name: str
    environments: tuple[str, ...]
    """Labels of the environments, as DomainBed's ENVIRONMENTS."""
    num_classes: int
    class_names: tuple[str, ...] | None = None
    """In the order of the class index; None: the sorted class folders."""
    folder: str = ""
    domain_folders: tuple[str, ...] = ()
    image_counts: tuple[int, ...] = ()
    """Images per environment; empty: not known for certain."""
    build_name: str = ""
    """Of the build with these images, where others are in circulation."""
    other_builds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> images per environment of another build in circulation, with which published results were made."""
    image_size: int = 224
    """Side of x for algorithms that have no tower of their own."""
    steps: int = 5001
    checkpoint_freq: int = 300
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    archives: tuple[Archive, ...] = ()
    arrange: Callable[[Path], None] | None = None
    """Turns the folder that all archives were unpacked into to `domain_folders`, where they do not hold these."""
    build: Callable[[], list[Images]] | None = None
    """Makes the environments' images; such data needs no `data_dir`."""

    @property
    def builds(self) -> dict[str, tuple[int, ...]]:
        """Name -> images per environment of every known build, its own first."""
        return {self.build_name: self.image_counts, **self.other_builds} if self.image_counts else {}
