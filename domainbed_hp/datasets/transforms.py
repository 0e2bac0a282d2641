"""From a PIL image to a square uint8 array (3, S, S), for scoring and for training.

Every random choice comes from the caller's generator, none from a global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image, ImageEnhance

SCALE = (0.7, 1.0)
RATIO = (3 / 4, 4 / 3)
JITTER = 0.3
GREY = 0.1
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Pixels(Protocol):
    """How a method wants its images; `algorithms.base.Pixels` is one."""

    @property
    def size(self) -> int: ...

    @property
    def resize(self) -> str:
        """`crop`: short side to `size`, then centre crop (CLIP). `squash`: both sides to `size` (DomainBed)."""

    @property
    def interpolation(self) -> str:
        """`bicubic` or `bilinear`."""

    @property
    def augmentation(self) -> str:
        """Of training images: `crop_flip`, `domainbed` or `none`."""


def evaluate(image: Image.Image, size: int, resize: str, interpolation: str) -> np.ndarray:
    """`image` as it is scored: `crop` equals open_clip's evaluation transform, `squash` DomainBed's, bit for bit."""
    image = image.convert("RGB")
    resample = RESAMPLING[interpolation]
    if resize == "squash":
        return array(image.resize((size, size), resample))
    if resize != "crop":
        raise ValueError(f"resize: got {resize!r}, known: 'crop', 'squash'")
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return array(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def augment(
    image: Image.Image, size: int, resize: str, interpolation: str, augmentation: str, rng: np.random.Generator
) -> np.ndarray:
    """`image` as it is trained on.

    `crop_flip`: random resized crop of 0.7 to 1 of the area, mirrored half the time. `domainbed`: these, colour
    jitter of 0.3 and one in ten grey, as DomainBed's datasets.py. `none`: as it is scored.
    """
    if augmentation == "none":
        return evaluate(image, size, resize, interpolation)
    if augmentation not in ("crop_flip", "domainbed"):
        raise ValueError(f"augmentation: got {augmentation!r}, known: 'crop_flip', 'domainbed', 'none'")
    image = image.convert("RGB")
    image = image.crop(crop_box(*image.size, rng)).resize((size, size), RESAMPLING[interpolation])
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation == "domainbed":
        image = colour_jitter(image, rng)
        if rng.random() < GREY:
            image = image.convert("L").convert("RGB")
    return array(image)


def array(image: Image.Image) -> np.ndarray:
    """Channels first, contiguous."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of torchvision's RandomResizedCrop: ten tries, then the largest allowed centre."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def colour_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter(.3, .3, .3, .3)."""
    steps: list[Callable[[Image.Image, float], Image.Image]] = [
        lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
        lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
        lambda image, factor: ImageEnhance.Color(image).enhance(factor),
        lambda image, factor: shift_hue(image, factor - 1),
    ]
    factors = rng.uniform(1 - JITTER, 1 + JITTER, len(steps))
    for i in rng.permutation(len(steps)):
        image = steps[i](image, float(factors[i]))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue circle by `turns`."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turns * 255)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
