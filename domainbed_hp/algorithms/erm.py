"""ERM, empirical risk minimization (Vapnik, 1998): DomainBed's baseline, algorithms.py."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms.base import Algorithm, Metrics, Minibatch, to_log
from domainbed_hp.hparams_registry import SMALL_IMAGES, HParam, choice, log_uniform
from domainbed_hp.networks.compiled import compile_blocks
from domainbed_hp.networks.featurizer import BACKBONES, make_classifier, make_featurizer
from domainbed_hp.networks.preprocess import Normalise, Preprocess

SMALL_BACKBONE = (*SMALL_IMAGES, "ShapesDG")
"""Data sets for a small CNN trained from scratch, with DomainBed's learning rates and batches for small images."""


def on_small_images(default: Any, sample: Callable[[np.random.RandomState], Any] | None = None) -> dict[str, HParam]:
    """Return `by_dataset` of an hparam with this default and sampler on small images."""
    return dict.fromkeys(SMALL_BACKBONE, HParam(default, sample))


class ERM(Algorithm):
    """Cross-entropy over all environments' images. All weights of a featurizer and a classifier train, by Adam."""

    # DEVIATION: DomainBed's resnet18, resnet50_augmix, dinov2 and vit are one hparam, `backbone`. Its default is the
    # ResNet-50 of the published tables, IMAGENET1K_V1; DomainBed has other weights since.
    CAPTURABLE = True
    HPARAMS = {
        "backbone": HParam("resnet50", choices=BACKBONES, help="image encoder", by_dataset=on_small_images("small")),
        "backbone_weights": HParam("imagenet", help="weights of a ResNet: imagenet, random, or the path of a file"),
        "clip_model": HParam("ViT-B-16-quickgelu", help="backbone=clip: model name of open_clip"),
        "clip_pretrained": HParam("openai", help="backbone=clip: open_clip tag, file, local-dir:FOLDER, or random"),
        "input_norm": HParam(
            "none", choices=("none", "imagenet"), help="normalisation that the input has; imagenet: as in DomainBed"
        ),
        "data_augmentation": HParam(True, help="augment training images as DomainBed does"),
        "resnet_dropout": HParam(0.0, choice(0.0, 0.1, 0.5), at_least=0, help="dropout on a ResNet's features"),
        "freeze_bn": HParam(False, help="freeze the statistics of a ResNet's batch norms"),
        "nonlinear_classifier": HParam(False, help="classifier of three layers instead of one"),
        "class_balanced": HParam(False, help="draw every class equally often"),
        "lr": HParam(
            5e-5,
            log_uniform(10, -5, -3.5),
            "learning rate of Adam",
            at_least=0,
            by_dataset=on_small_images(1e-3, log_uniform(10, -4.5, -2.5)),
        ),
        "weight_decay": HParam(
            0.0, log_uniform(10, -6, -2), "weight decay of Adam", at_least=0, by_dataset=on_small_images(0.0)
        ),
        "batch_size": HParam(
            32,
            lambda r: int(2 ** r.uniform(3, 5.5)),
            "images per environment",
            at_least=1,
            by_dataset=on_small_images(64, lambda r: int(2 ** r.uniform(3, 9)))
            | {"DomainNet": HParam(32, lambda r: int(2 ** r.uniform(3, 5)))},
        ),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.normalise = Normalise() if hparams["input_norm"] == "imagenet" else None
        self.featurizer = make_featurizer(
            hparams["backbone"],
            weights=hparams["backbone_weights"],
            dropout=hparams["resnet_dropout"],
            freeze_bn=hparams["freeze_bn"],
            clip_model=hparams["clip_model"],
            clip_pretrained=hparams["clip_pretrained"],
        )
        self.classifier = make_classifier(self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.optimizer = torch.optim.Adam(self.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"])

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        cls.preprocess(hparams, 224)  # refuses an unknown CLIP

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        augmentation: Literal["domainbed", "none"] = "domainbed" if hparams["data_augmentation"] else "none"
        if hparams["backbone"] == "clip":
            from domainbed_hp.networks.clip import find_clip

            tower = find_clip(hparams["clip_model"], hparams["clip_pretrained"]).preprocess
            return tower._replace(augmentation=augmentation)
        return Preprocess(image_size, "squash", "bilinear", augmentation)

    @classmethod
    def describe_protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        backbone, clip = hparams["backbone"], f"{hparams['clip_model']}, {hparams['clip_pretrained']}"
        weights = {"clip": clip, "small": None}.get(backbone, f"{backbone}, {hparams['backbone_weights']}")
        return super().describe_protocol(hparams) | {"weights": weights}

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        statistics = self.compute_gradients(minibatches)
        self.optimizer.step()
        return to_log(statistics, self.hparams)

    def compute_gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        loss = F.cross_entropy(self.predict(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        return {"loss": loss.detach()}

    def compile_parts(self) -> None:
        compile_blocks(self)  # only backbone=clip has blocks

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.featurizer(x if self.normalise is None else self.normalise.undo(x)))
        return logits
