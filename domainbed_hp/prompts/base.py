"""The contract of a text side: class names in, a classifier of image features out, on any image side."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.fused import make_fused_adamw
from domainbed_hp.networks.vit import VisionTower
from domainbed_hp.registry import PROMPTS, UsageError, load, refuse_renamed_methods

TEMPLATE = "a photo of a {}."
RENAMED_METHODS = {
    "optimizer": "make_optimizer()",
    "losses": "backward()",
    "transductive": "the class method is_transductive(hparams)",
}
"""Methods that an earlier version called -> their replacement."""
TEMPLATE_HPARAMS = {"template": HParam(TEMPLATE, help="prompt of a class; {} stands for its name")}


def make_prompts(class_names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """Return one prompt per class. Underscores in class names become spaces."""
    if template.count("{}") != 1:
        raise UsageError(f"template {template!r}: expected one {{}} where the class name goes, e.g. {TEMPLATE!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


class TextSide(nn.Module):
    """Logits = T * cos(image feature, text feature of the class). T is CLIP's own frozen temperature.

    A subclass registers the buffer `features` (C, E) or overrides `encode`. One that trains overrides `make_optimizer`.
    Shapes: B images, C classes, E the size of a feature.
    """

    HPARAMS: ClassVar[dict[str, HParam]] = {}
    TRAINS: ClassVar[bool] = True
    """True: it trains on images, with the image side. False: its classifier is made of text alone."""
    TEXT: ClassVar[bool] = True
    """True: it has text features. False: it is a plain linear classifier."""
    CHANGES_TOWER: ClassVar[bool] = False
    """True: `attach` changes the image tower."""
    PER_IMAGE: ClassVar[bool] = False
    """True: the text features depend on the image."""
    CAPTURABLE: ClassVar[bool] = False
    """As `Algorithm.CAPTURABLE`. A subclass does not inherit it."""
    SOURCE_FREE: ClassVar[bool] = False
    """True: it trains, but not on images."""

    features: Tensor

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__()
        self.class_names, self.hparams, self.logit_scale = list(class_names), hparams, clip.logit_scale
        self.cached_features: tuple[Any, Tensor] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_renamed_methods(cls, RENAMED_METHODS)

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """Raise `UsageError` for hparams that do not go together. Called before anything is built."""
        if "template" in cls.HPARAMS:
            make_prompts([], hparams["template"])

    @classmethod
    def trains(cls, hparams: dict[str, Any]) -> bool:
        """Return `TRAINS`, under these hparams."""
        return cls.TRAINS

    @classmethod
    def is_transductive(cls, hparams: dict[str, Any]) -> bool:
        """Return whether a prediction depends on the other images of its batch."""
        return False

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """Return unit-norm text features (C, E), or (B, C, E) if they depend on the image.

        `images` are unit-norm image features (B, E). `sizes` are the numbers of images of the source domains, in the
        order of the batch; None in evaluation.
        """
        return self.features

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """Return an optimizer of everything that trains here. The algorithm gives it a cosine schedule."""
        return None

    def attach(self, tower: VisionTower) -> None:
        """Change the image tower, for text sides with `CHANGES_TOWER`."""

    def backward(self) -> dict[str, Tensor]:
        """Add the gradients of the text side's own loss, if it has one, and return it, detached, to log."""
        return {}

    def merge(self) -> dict[str, Tensor]:
        """Return the changed weights of CLIP's text tower by name; `UsageError` if no text tower computes the same."""
        raise UsageError(
            f"prompt={self.hparams['prompt']}: no plain CLIP has its classifier, so it cannot be exported; the "
            "image tower alone is `algorithm.tower.merge()`"
        )

    def compute_class_features(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return the result of `encode`, cached if no gradient is needed and the images do not matter.

        The cache is valid until a parameter or buffer changes.
        """
        if self.PER_IMAGE or torch.is_grad_enabled():
            return self.encode(images, sizes)
        state = (*self.parameters(), *self.buffers())
        cast = torch.is_autocast_enabled(images.device.type)
        key = (images.device, cast, self.training, *((id(value), value._version) for value in state))
        if self.cached_features is None or self.cached_features[0] != key:
            self.cached_features = key, self.encode(images, sizes)
        return self.cached_features[1]

    def forward(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return logits (B, C) of image features (B, E) of any length."""
        images = unit(features)
        return self.logit_scale * compute_similarity(images, self.compute_class_features(images, sizes))


def compute_similarity(images: Tensor, text: Tensor) -> Tensor:
    """Return cosines (B, C) of unit-norm image features (B, E) with text features (C, E) or (B, C, E)."""
    with torch.autocast(images.device.type, enabled=False):
        return images @ text.T if text.dim() == 2 else torch.einsum("be,bce->bc", images, text)


def unit(features: Tensor) -> Tensor:
    """Return features of length 1, in fp32 or better."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def make_sgd(parameters: Any, hparams: dict[str, Any]) -> torch.optim.Optimizer:
    """Return SGD with momentum 0.9, `prompt_lr` and `prompt_weight_decay`: the optimizer of prompt learners."""
    return torch.optim.SGD(parameters, hparams["prompt_lr"], momentum=0.9, weight_decay=hparams["prompt_weight_decay"])


def make_adamw(parameters: Any, hparams: dict[str, Any]) -> torch.optim.Optimizer:
    """Return AdamW with `prompt_lr` and `prompt_weight_decay`."""
    return make_fused_adamw(parameters, lr=hparams["prompt_lr"], weight_decay=hparams["prompt_weight_decay"])


def load_text_side_class(name: str) -> type[TextSide]:
    """Return the class registered as `name`. `UsageError` lists the known names."""
    text_side: type[TextSide] = load(PROMPTS, "prompt", name)
    return text_side


def make_text_side(clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> TextSide:
    """Return the text side that hparam `prompt` names."""
    return load_text_side_class(hparams["prompt"])(clip, class_names, hparams)
