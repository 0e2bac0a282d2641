"""ERM, empirical risk minimization (Vapnik, 1998): DomainBed's baseline, algorithms.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms.base import Algorithm, Metrics, Minibatch, Preprocess, join, logged
from domainbed_hp.hparams_registry import SMALL_IMAGES, HParam, choice, log_uniform
from domainbed_hp.networks.compiled import compile_blocks
from domainbed_hp.networks.featurizer import BACKBONES, classifier, featurizer
from domainbed_hp.networks.preprocess import Normalise

SMALL_BACKBONE = (*SMALL_IMAGES, "ShapesDG")
"""Data sets that a small CNN learns from scratch, with DomainBed's learning rates and batches for small images."""


class ERM(Algorithm):
    """Cross-entropy of the joined minibatches, in all weights of a featurizer and a classifier, by Adam."""

    # DEVIATION: DomainBed's resnet18, resnet50_augmix, dinov2 and vit are one hparam, `backbone`; its default is the
    # ResNet-50 of the published tables, IMAGENET1K_V1, where DomainBed has changed to other weights since.
    CAPTURABLE = True
    HPARAMS = {
        "backbone": HParam("resnet50", choices=BACKBONES, help="the featurizer"),
        "backbone_weights": HParam("imagenet", help="of a ResNet: imagenet, random, or a file with a state dict"),
        "clip_model": HParam("ViT-B-16-quickgelu", help="open_clip's name of the tower of backbone clip"),
        "clip_pretrained": HParam("openai", help="open_clip's name of its weights, or a file"),
        "input_norm": HParam("none", choices=("none", "imagenet"), help="imagenet: x arrives normalised, undo it"),
        "data_augmentation": HParam(True, help="augment training images as DomainBed"),
        "resnet_dropout": HParam(0.0, choice(0.0, 0.1, 0.5), at_least=0, help="dropout on a ResNet's features"),
        "freeze_bn": HParam(False, help="keep a ResNet's batch norm as pretrained"),
        "nonlinear_classifier": HParam(False, help="three layers instead of one"),
        "class_balanced": HParam(False, help="draw every class equally often"),
        "lr": HParam(5e-5, log_uniform(10, -5, -3.5), at_least=0, help="of Adam"),
        "weight_decay": HParam(0.0, log_uniform(10, -6, -2), at_least=0, help="of Adam"),
        "batch_size": HParam(32, lambda r: int(2 ** r.uniform(3, 5.5)), at_least=1, help="per environment"),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.normalise = Normalise() if hparams["input_norm"] == "imagenet" else None
        self.featurizer = featurizer(
            hparams["backbone"],
            weights=hparams["backbone_weights"],
            dropout=hparams["resnet_dropout"],
            freeze_bn=hparams["freeze_bn"],
            clip_model=hparams["clip_model"],
            clip_pretrained=hparams["clip_pretrained"],
        )
        self.classifier = classifier(self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.optimizer = torch.optim.Adam(self.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"])

    @classmethod
    def hparams_for(cls, dataset: str) -> dict[str, HParam]:
        hparams = dict(cls.HPARAMS)
        if dataset in SMALL_BACKBONE:
            hparams |= {
                "backbone": HParam("small", choices=BACKBONES, help=hparams["backbone"].help),
                "lr": HParam(1e-3, log_uniform(10, -4.5, -2.5), at_least=0, help="of Adam"),
                "weight_decay": HParam(0.0, at_least=0, help="of Adam"),
                "batch_size": HParam(64, lambda r: int(2 ** r.uniform(3, 9)), at_least=1, help="per environment"),
            }
        elif dataset == "DomainNet":
            hparams["batch_size"] = HParam(32, lambda r: int(2 ** r.uniform(3, 5)), at_least=1, help="per environment")
        return hparams

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        cls.preprocess(hparams, 224)  # which refuses a CLIP that is not there

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        augmentation: Literal["domainbed", "none"] = "domainbed" if hparams["data_augmentation"] else "none"
        if hparams["backbone"] == "clip":
            from domainbed_hp.networks.clip import find_clip

            tower = find_clip(hparams["clip_model"], hparams["clip_pretrained"]).preprocess
            return tower._replace(augmentation=augmentation)
        return Preprocess(image_size, "squash", "bilinear", augmentation)

    @classmethod
    def protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        clip = hparams["clip_model"], hparams["clip_pretrained"]
        starts = {"clip": ", ".join(clip), "small": None}
        of_resnet = f"{hparams['backbone']}, {hparams['backbone_weights']}"
        return super().protocol(hparams) | {"weights": starts.get(hparams["backbone"], of_resnet)}

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        losses = self.gradients(minibatches)
        self.optimizer.step()
        return logged(losses, self.hparams)

    def gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        x, y = join(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        return {"loss": loss.detach()}

    def compile_parts(self) -> None:
        compile_blocks(self)  # of a CLIP

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.featurizer(x if self.normalise is None else self.normalise.undo(x)))
        return logits
