"""DomainBed's augmentation, image by image in Pillow: the oracle of `datasets.loading.augment`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from domainbed_hp.datasets.loading.augment import Draws
from domainbed_hp.datasets.loading.transforms import RESAMPLING, to_channels_first

OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    lambda image, factor: shift_hue(image, factor - 1),
)
"""In the order of `augment.OPERATIONS`."""


def augment(images: Sequence[Image.Image], draws: Draws, size: int, interpolation: str) -> np.ndarray:
    """uint8 (B, 3, S, S) of B decoded images."""
    done = []
    for i, image in enumerate(images):
        top, left, h, w = draws.box[i].tolist()
        image = image.crop((left, top, left + w, top + h)).resize((size, size), RESAMPLING[interpolation])
        if draws.flip[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draws.colour is not None:
            for number in draws.colour.order[i]:
                image = OPERATIONS[number](image, float(draws.colour.factors[i, number]))
            if draws.colour.grey[i]:
                image = image.convert("L").convert("RGB")
        done.append(to_channels_first(image))
    return np.stack(done)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue circle by `turns`."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turns * 255)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
