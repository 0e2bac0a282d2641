"""What training and scoring need of an image, as small uint8 arrays.

An image has two views: one to crop at random from, one to score. `prepare` stores them, and whoever has no prepared
data makes them from the decoded image at each access, so that both see the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from domainbed_hp.datasets.spec import Images

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

SCALE = (0.7, 1.0)
"""Share of the area that a random crop keeps."""
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Views(Protocol):
    """The images of one environment as loaders read them; `labels` is (N,) int64."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def training(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3), to crop at random from."""

    def evaluation(self, i: int) -> np.ndarray:
        """uint8 (3, S, S), to score; or float32 (E,), its features."""

    def fingerprint(self) -> str:
        """Another one where an image or a label is another, as far as can be told; empty where nothing can."""


class Decoded:
    """The views of raw images, made at each access."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images, self.preprocess, self.labels = images, preprocess, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def training(self, i: int) -> np.ndarray:
        return training_view(self.images[i], self.preprocess.size, self.preprocess.interpolation)

    def evaluation(self, i: int) -> np.ndarray:
        return evaluation_view(
            self.images[i], self.preprocess.size, self.preprocess.resize, self.preprocess.interpolation
        )

    def fingerprint(self) -> str:
        # Images of a user's own class need none, and one that is inherited does not know what the class does.
        own: Callable[[Images], str] | None = vars(type(self.images)).get("fingerprint")
        return own(self.images) if own else ""


def evaluation_view(image: Image.Image, size: int, resize: str, interpolation: str) -> np.ndarray:
    """uint8 (3, S, S): `crop` equals open_clip's evaluation transform, `squash` DomainBed's, bit for bit."""
    image = image.convert("RGB")
    resample = RESAMPLING[interpolation]
    if resize == "squash":
        return channels_first(image.resize((size, size), resample))
    if resize != "crop":
        raise ValueError(f"resize: got {resize!r}, known: 'crop', 'squash'")
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return channels_first(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def training_view(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    """uint8 (h, w, 3): the image, reduced so far that its smallest square random crop still has `size` pixels a side.

    Never enlarged. Of an image longer than 2:1 the centre is kept: where the sides differ by more than 1.9, no random
    crop of 0.7 of the area and a ratio up to 4:3 fits, and torchvision's RandomResizedCrop takes a centred one.
    """
    image = image.convert("RGB")
    width, height = image.size
    if max(width, height) > 2 * min(width, height):
        width, height = min(width, 2 * height), min(height, 2 * width)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    factor = math.ceil(size / math.sqrt(SCALE[0])) / min(width, height)
    if factor < 1:
        image = image.resize((round(width * factor), round(height * factor)), RESAMPLING[interpolation])
    return np.asarray(image)


def channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
