"""The contract of a text side: class names in, a classifier of image features out. Any image side takes any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.fused import fused_adamw
from domainbed_hp.networks.vit import VisionTower
from domainbed_hp.registry import PROMPTS, UsageError, load

TEMPLATE = "a photo of a {}."
TEMPLATE_HPARAMS = {"template": HParam(TEMPLATE, help="prompt of a class; {} is its name")}


def class_prompts(class_names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """One prompt a class; underscores in class names become spaces."""
    if template.count("{}") != 1:
        raise UsageError(f"template {template!r}: expected one {{}} where the class name goes, e.g. {TEMPLATE!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


class TextSide(nn.Module):
    """Logits = T * cos(image feature, text feature of the class), T being CLIP's own frozen temperature.

    A subclass gives `encode`, and `optimizer` where it trains. Shapes: B images, C classes, E the size of a feature.
    """

    HPARAMS: ClassVar[dict[str, HParam]] = {}
    TRAINS: ClassVar[bool] = True
    """On images, together with the image side. False: its classifier is made of text alone, before the first step."""
    TEXT: ClassVar[bool] = True
    """It has text features. False: a plain linear classifier, with nothing to measure a margin by."""
    REACHES_IN: ClassVar[bool] = False
    """`attach` changes the image tower."""
    PER_IMAGE: ClassVar[bool] = False
    """The text features depend on the image."""
    CAPTURABLE: ClassVar[bool] = False
    """As `Algorithm.CAPTURABLE`, and not inherited either."""
    SOURCE_FREE: ClassVar[bool] = False
    """Trained, but not on images."""

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__()
        self.class_names, self.hparams, self.logit_scale = list(class_names), hparams, clip.logit_scale
        self.kept: tuple[Any, Tensor] | None = None

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """`UsageError` for hparams that do not go together, before anything is built."""
        if "template" in cls.HPARAMS:
            class_prompts([], hparams["template"])

    @classmethod
    def trains(cls, hparams: dict[str, Any]) -> bool:
        """`TRAINS`, where it depends on hparams."""
        return cls.TRAINS

    @classmethod
    def transductive(cls, hparams: dict[str, Any]) -> bool:
        """Whether a prediction depends on the other images of its batch."""
        return False

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """Unit-norm text features, (C, E), or (B, C, E) where each image has its own.

        `images`: unit-norm image features (B, E). `sizes`: of the source domains that follow each other in the batch;
        None in evaluation.
        """
        raise NotImplementedError(f"{type(self).__name__}.encode")  # also where TEXT is False

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Over all that trains here; the algorithm gives it a cosine schedule."""
        return None

    def attach(self, tower: VisionTower) -> None:
        """Where a text side reaches into the image tower."""

    def losses(self) -> dict[str, Tensor]:
        """What it trains by besides the image side's loss."""
        return {}

    def merge(self) -> dict[str, Tensor]:
        """CLIP's own text weights that it changed, under their own names; `UsageError` where others classify."""
        raise UsageError(
            f"prompt={self.hparams['prompt']}: its classifier is not what a CLIP's text tower makes of a template; the "
            "image tower alone is `algorithm.tower.merge()`"
        )

    def class_features(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """`encode`, asked once as long as nothing changes where no gradient is wanted and images do not matter."""
        if self.PER_IMAGE or torch.is_grad_enabled():
            return self.encode(images, sizes)
        state = (*self.parameters(), *self.buffers())
        cast = torch.is_autocast_enabled(images.device.type)
        now = (images.device, cast, self.training, *((id(value), value._version) for value in state))
        if self.kept is None or self.kept[0] != now:
            self.kept = now, self.encode(images, sizes)
        return self.kept[1]

    def forward(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Image features (B, E) of any length -> logits (B, C)."""
        images = unit(features)
        return self.logit_scale * similarity(images, self.class_features(images, sizes))


def similarity(images: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, C) of unit-norm image features (B, E) with text features (C, E) or (B, C, E)."""
    with torch.autocast(images.device.type, enabled=False):
        return images @ text.T if text.dim() == 2 else torch.einsum("be,bce->bc", images, text)


def unit(features: Tensor) -> Tensor:
    """Features of length 1, in fp32 or better."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def sgd(parameters: Any, hparams: dict[str, Any]) -> torch.optim.Optimizer:
    """What prompt learners train with: SGD with momentum 0.9, by `prompt_lr` and `prompt_weight_decay`."""
    return torch.optim.SGD(parameters, hparams["prompt_lr"], momentum=0.9, weight_decay=hparams["prompt_weight_decay"])


def adamw(parameters: Any, hparams: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW by `prompt_lr` and `prompt_weight_decay`."""
    return fused_adamw(parameters, lr=hparams["prompt_lr"], weight_decay=hparams["prompt_weight_decay"])


def prompt_class(name: str) -> type[TextSide]:
    """The class registered as `name`; `UsageError` lists the known names."""
    found: type[TextSide] = load(PROMPTS, "prompt", name)
    return found


def text_side(clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> TextSide:
    """The text side that hparam `prompt` names."""
    return prompt_class(hparams["prompt"])(clip, class_names, hparams)
