"""Random crops, flips and colours of a whole minibatch, on the device of the model.

The random numbers are drawn on the host from a generator keyed by (seed, environment, step): a run sees the same images
on any device, and resumes at any step. The distributions are those of torchvision's RandomResizedCrop,
RandomHorizontalFlip, ColorJitter and RandomGrayscale with the arguments of DomainBed's datasets.py.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.datasets.loading.transforms import SCALE

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

RATIO = (3 / 4, 4 / 3)
"""Range of a crop's width divided by its height."""
TRIES = 10
JITTER = 0.3
"""Largest relative change of brightness, contrast and saturation, and of the hue in turns of the circle."""
GREY = 0.1
"""Probability that an image loses its colours."""
LUMA = (0.299, 0.587, 0.114)


class ColourDraws(NamedTuple):
    """The random changes of the colours of B images; operations are numbered as in `OPERATIONS`."""

    factors: np.ndarray
    """(B, 4): the factor of every operation."""
    order: np.ndarray
    """(B, 4): the number of the operation that comes k-th."""
    grey: np.ndarray
    """bool (B,): True where the image becomes grey at the end."""


class Draws(NamedTuple):
    """The random numbers of the augmentation of B images."""

    box: np.ndarray
    """int (B, 4): top, left, height and width of the crop."""
    flip: np.ndarray
    """bool (B,)."""
    colour: ColourDraws | None


def draw_augmentation(sizes: np.ndarray, augmentation: str, random: np.random.Generator) -> Draws:
    """Draw the augmentation of images with the heights and widths `sizes` (B, 2)."""
    if augmentation not in ("crop_flip", "domainbed"):
        raise ValueError(f"augmentation: got {augmentation!r}, known: 'crop_flip', 'domainbed'")
    count = len(sizes)
    box, flip = draw_boxes(sizes, random), random.random(count) < 0.5
    if augmentation == "crop_flip":
        return Draws(box, flip, None)
    factors = random.uniform(1 - JITTER, 1 + JITTER, (count, 4))
    order = random.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    return Draws(box, flip, ColourDraws(factors, order, random.random(count) < GREY))


def draw_boxes(sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw crops as torchvision's RandomResizedCrop: (B, 4) top, left, height and width.

    The crop is the first of ten tries that fits, or the largest allowed centre if none fits.
    """
    full_h, full_w = sizes[:, :1], sizes[:, 1:]  # (B, 1)
    area = full_h * full_w * random.uniform(*SCALE, (len(sizes), TRIES))
    ratio = np.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1]), area.shape))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # (B, TRIES)
    fits = (w > 0) & (w <= full_w) & (h > 0) & (h <= full_h)
    first = fits.argmax(axis=1)[:, None]
    any_fits = fits.any(axis=1, keepdims=True)  # (B, 1)
    h = np.where(any_fits, np.take_along_axis(h, first, 1), np.minimum(full_h, np.rint(full_w / RATIO[0])))
    w = np.where(any_fits, np.take_along_axis(w, first, 1), np.minimum(full_w, np.rint(full_h * RATIO[1])))
    place = np.where(any_fits[:, :, None], random.random((len(sizes), 1, 2)), 0.5)
    top, left = (full_h - h + any_fits) * place[..., 0], (full_w - w + any_fits) * place[..., 1]
    return np.hstack([top, left, h, w]).astype(np.int64)


def augment(images: Tensor, draws: Draws, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Return x (B, 3, S, S), float in [0, 1] on `device`, from uint8 `images` (B, H, W, 3).

    An image may fill only the upper left of its (H, W). Crops do not look at the rest.
    """
    if device.type == "cpu":
        x = crop_by_kernel(images, draws, preprocess.size, preprocess.interpolation)
    else:
        x = crop_by_matrix(images.to(device, non_blocking=True), draws, preprocess.size, preprocess.interpolation)
    return x if draws.colour is None else jitter_colours(x, draws.colour)


def crop_by_kernel(images: Tensor, draws: Draws, size: int, interpolation: str) -> Tensor:
    """Crop, resize and flip by torch's uint8 kernel, which filters as Pillow does; the fastest on a CPU."""
    x = torch.empty(len(images), 3, size, size)
    for image, (top, left, h, w), flip, target in zip(images, draws.box.tolist(), draws.flip.tolist(), x, strict=True):
        crop = image[top : top + h, left : left + w].permute(2, 0, 1)[None]
        small = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]
        torch.div(small.flip(-1) if flip else small, 255, out=target)
    return x


def crop_by_matrix(images: Tensor, draws: Draws, size: int, interpolation: str) -> Tensor:
    """Crop, resize and flip all images at once by two matrix products, with the same filters as Pillow."""
    count, height, width, _ = images.shape
    top, left, h, w = torch.from_numpy(draws.box).to(images.device, torch.float32, non_blocking=True).unbind(1)
    rows = make_filters(top, h, height, size, interpolation)
    columns = make_filters(left, w, width, size, interpolation)
    flip = torch.from_numpy(draws.flip).to(images.device, non_blocking=True)[:, None, None]
    columns = torch.where(flip, columns.flip(1), columns)
    x = images.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, H, W)
    return (rows[:, None] @ (x @ columns[:, None].mT).clamp_(0, 1)).clamp_(0, 1)


def make_filters(start: Tensor, length: Tensor, full: int, size: int, interpolation: str) -> Tensor:
    """Return (B, size, full): row i has the weights of the pixels of [start, start + length) in pixel i of the result.

    As in Pillow the filter is a triangle or Keys' cubic of a = -1/2, stretched if the result is smaller than the crop.
    """
    scale = (length / size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    places = torch.arange(full, device=start.device) + 0.5
    d = ((places - centres) / scale.clamp(min=1)).abs()
    if interpolation == "bilinear":
        weights = (1 - d).clamp(min=0)
    else:
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = torch.where(d < 1, near, torch.where(d < 2, far, 0))
    weights = weights * ((places >= start[:, None, None]) & (places < (start + length)[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def jitter_colours(x: Tensor, colour: ColourDraws) -> Tensor:
    """Apply every image's operations in its own order, then make some images grey; changes x (B, 3, S, S)."""
    # On the CPU one image at a time: it stays in a core's cache, several times faster than pass after pass over all.
    factors = torch.from_numpy(colour.factors).float()[:, :, None, None, None].to(x.device, non_blocking=True)
    step = 1 if x.device.type == "cpu" else len(x)
    for i in range(0, len(x), step):
        piece = slice(i, i + step)
        x[piece] = recolour(x[piece], factors[piece], colour.order[piece], colour.grey[piece])
    return x


def recolour(x: Tensor, factors: Tensor, order: np.ndarray, grey: np.ndarray) -> Tensor:
    """Apply the colour operations to images x that are processed together."""
    for k, number in product(range(4), range(4)):
        some = np.flatnonzero(order[:, k] == number)
        if len(some) == len(x):
            x = OPERATIONS[number](x, factors[:, number])
        elif len(some):
            on_device = torch.from_numpy(some).to(x.device, non_blocking=True)  # an array as index waits for the device
            x[on_device] = OPERATIONS[number](x[on_device], factors[on_device, number])
    some = np.flatnonzero(grey)
    if len(some):
        on_device = torch.from_numpy(some).to(x.device, non_blocking=True)
        x[on_device] = compute_luma(x[on_device])
    return x


def compute_luma(x: Tensor) -> Tensor:
    """Return (B, 1, S, S), the grey of ITU-R 601, as Pillow's mode L."""
    r, g, b = x.split(1, dim=1)
    grey: Tensor = r * LUMA[0]
    return grey.add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(compute_luma(x).mean(dim=(2, 3), keepdim=True) * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(compute_luma(x) * (1 - factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn HSV's hue circle by `factor` - 1, exactly.

    With chroma c = max - min and hue h in sixths of the circle, the channel whose own hue is p has the value
    min + c * clamp(| |h - p| - 3 | - 1, 0, 1), for |h - p| up to 7. All is piecewise linear in RGB: with h multiplied
    by c throughout, it needs no division and no modulo.
    """
    # `lerp` with a sign selects several times faster on a CPU than `where`.
    r, g, b = x.split(1, dim=1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    c = high - low
    not_r, not_g = torch.sign(high - r), torch.sign(high - g)  # 0 where that channel is the highest, else 1
    h = torch.lerp(g - b, torch.lerp((b - r).add_(c, alpha=2), (r - g).add_(c, alpha=4), not_g), not_r)
    h += 6 * (factor - 1) * c
    values = [(h - p * c).abs_().sub_(c, alpha=3).abs_().sub_(c).clamp_(min=0) for p in (0, 2, 4)]
    return torch.cat([torch.minimum(value, c).add_(low) for value in values], dim=1)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
