"""The two views of an image that training and scoring read, as small uint8 arrays.

The training view is the image to crop at random from; the evaluation view is the image to score. `prepare` stores both,
the training view as JPEG in encoding `compressed`. Without prepared data they are made from the decoded image at each
access.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from domainbed_hp.datasets.spec import Images

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

SCALE = (0.7, 1.0)
"""Range of a random crop's area, relative to the image's."""
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class DecodedViews:
    """The views of raw images, made at each access."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images, self.preprocess, self.labels = images, preprocess, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def load_training_view(self, i: int) -> np.ndarray:
        return make_training_view(self.images[i], self.preprocess.size, self.preprocess.interpolation)

    def load_evaluation_view(self, i: int) -> np.ndarray:
        p = self.preprocess
        return make_evaluation_view(self.images[i], p.size, p.resize, p.interpolation)

    def fingerprint(self) -> str:
        # Only the class's own method counts: an inherited one does not know what a user's subclass changes.
        method: Callable[[Images], str] | None = vars(type(self.images)).get("fingerprint")
        return method(self.images) if method else ""


def make_evaluation_view(image: Image.Image, size: int, resize: str, interpolation: str) -> np.ndarray:
    """Return uint8 (3, S, S): `crop` equals open_clip's evaluation transform, `squash` DomainBed's, bit for bit."""
    image = image.convert("RGB")
    resample = RESAMPLING[interpolation]
    if resize == "squash":
        return to_channels_first(image.resize((size, size), resample))
    if resize != "crop":
        raise ValueError(f"resize: got {resize!r}, known: 'crop', 'squash'")
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_channels_first(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def make_training_view(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    """Return uint8 (h, w, 3): the image, made smaller as long as its smallest square crop has `size` pixels a side.

    The image is never enlarged. Of an image longer than 2:1 only the centre remains.
    """
    # Above a ratio of 1.9 no crop of 0.7 of the area and a ratio up to 4:3 fits; RandomResizedCrop takes a centred one.
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


def to_channels_first(image: Image.Image) -> np.ndarray:
    """Return the pixels of `image` as (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
