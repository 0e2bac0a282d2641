"""What the CLIP methods share: a frozen image tower, the text classifier, cross-entropy, AdamW with a cosine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Algorithm, Minibatch, Pixels, join
from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import find_clip, load_clip
from domainbed_hp.networks.normalise import Normalise
from domainbed_hp.networks.prompts import TEMPLATE, class_prompts
from domainbed_hp.networks.vit import Trace
from domainbed_hp.registry import UsageError

CLIP_HPARAMS = {
    "clip_model": HParam("ViT-B-16-quickgelu", help="open_clip model name, or mini"),
    "clip_pretrained": HParam("openai", help="tag, checkpoint file, local-dir:FOLDER, or random"),
    "template": HParam(TEMPLATE, help="prompt of a class; {} is its name"),
    "input_norm": HParam("none", choices=("none", "imagenet"), help="imagenet: x comes normalised, as in DomainBed"),
    "batch_size": HParam(12, choice(8, 12, 16, 24), "images per environment", at_least=1),
}
ADAMW_HPARAMS = {
    "lr": HParam(5e-4, log_uniform(10, -4.5, -2.5), "AdamW, cosine to 0", at_least=0),
    "weight_decay": HParam(0.01, log_uniform(10, -6, -2), at_least=0),
}


class ClipAlgorithm(Algorithm):
    """CLIP with a frozen text classifier: logits = T * cos(image feature, text feature of the class).

    Nothing trains until a subclass says so: it unfreezes or adds parameters to `tower`, then calls `train_with`.
    """

    HPARAMS = CLIP_HPARAMS

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        class_names = class_names or hparams.get("class_names")
        if not class_names or len(class_names) != num_classes:
            raise UsageError(
                f"{type(self).__name__}: got class names {class_names!r}, expected {num_classes}. "
                'Pass class_names=[...] or hparams["class_names"].'
            )
        clip = load_clip(hparams["clip_model"], hparams["clip_pretrained"])
        self.tower = clip.visual.requires_grad_(False)
        text = clip.text_features(class_prompts(class_names, hparams["template"]))  # the text tower is dropped here
        self.register_buffer("class_features", text, persistent=False)  # (C, E), unit-norm
        self.class_features: Tensor
        self.logit_scale = clip.logit_scale
        self.domainbed_norm = Normalise()
        self.optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def pixels(cls, hparams: dict[str, Any], image_size: int) -> Pixels:
        """The tower's own size and interpolation, short side and centre crop; training crops and flips."""
        source = find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        return Pixels(*source.pixels, augmentation="crop_flip")

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        class_prompts([], hparams["template"])

    def train_with(self, *groups: dict[str, Any]) -> None:
        """AdamW over parameter groups, cosine to 0 over `hparams["steps"]` (which the harness gives; else constant)."""
        self.optimizer = torch.optim.AdamW(groups)
        self.schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.hparams["steps"])
            if "steps" in self.hparams
            else None
        )

    def step(self) -> None:
        """One optimizer step and one step of the schedule."""
        assert self.optimizer is not None
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def encode(self, x: Tensor, trace: list[Trace] | None = None) -> Tensor:
        """Unit-norm image features (B, E), in fp32 or better."""
        if self.hparams["input_norm"] == "imagenet":  # a stock DomainBed checkout normalises before us
            x = self.domainbed_norm.undo(x)
        features = self.tower(x, trace)
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def classify(self, features: Tensor) -> Tensor:
        """Unit-norm image features (B, E) -> logits (B, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale * features @ self.class_features.T

    def predict(self, x: Tensor) -> Tensor:
        return self.classify(self.encode(x))

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """One step of cross-entropy over all environments' images."""
        x, y = join(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            loss.backward()
            self.step()
        return {"ce": loss.item()}


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The same parameters, unfrozen."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
