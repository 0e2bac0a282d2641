"""Preprocessing, which belongs to the weights of a network: size, resizing, augmentation, normalisation."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocess(NamedTuple):
    """Size and resizing of the images that a method takes, and the augmentation of its training images."""

    size: int
    """Height and width of x in pixels."""
    resize: Literal["crop", "squash"] = "squash"
    """`crop`: short side to `size`, then centre crop (CLIP). `squash`: both sides to `size` (DomainBed)."""
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"
    augmentation: Literal["crop_flip", "domainbed", "none"] = "domainbed"
    """`crop_flip`: RandomResizedCrop(0.7, 1) and flip. `domainbed`: these, colour jitter 0.3 and 10 % grey."""


class Normalise(nn.Module):
    """Normalisation (x - mean) / std per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(-self.mean / self.std, x, 1 / self.std)  # one pass

    def undo(self, x: Tensor) -> Tensor:
        """Return the images whose normalisation is x."""
        return x * self.std + self.mean
