"""MIRO: Cha et al., "Domain Generalization by Mutual-Information Regularization with Pre-trained Models", ECCV 2022."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm, backpropagate, count_images, unfreeze
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.preprocess import Normalise, Preprocess
from domainbed_hp.networks.vit import Trace
from domainbed_hp.registry import UsageError

VARIANCE, EPSILON = 0.1, 1e-5
"""Variance at the start, and the least variance."""


class MIRO(ClipAlgorithm):
    """Fine-tuning that stays close to the pretrained tower: cross-entropy + lambda times a penalty.

    The penalty sums mean[(f_l - f0_l)^2 / var_l + log var_l] / 2 over features l: the input of the first layer, and the
    output of the last layer of each quarter of the tower, all tokens. f0 is the pretrained tower's feature; var has one
    trained value per channel. Trainable parameters: the tower, 5 D, the text side; ViT-B/16 86,192,640 + 3,840 + 513 C.
    """

    # DEVIATION: the first feature is the input of the first layer, where the release has conv1's output. The schedule
    # is a cosine, where MIRO's learning rate is constant. The linear classifier has its own learning rate, prompt_lr,
    # where MIRO's has lr. Preprocessing is CLIP's, where the release squashes and normalises as for ImageNet.
    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | {
        "prompt": replace(CLIP_HPARAMS["prompt"], default="random"),
        "augmentation": replace(CLIP_HPARAMS["augmentation"], default="domainbed"),
        "batch_size": HParam(32, lambda r: int(2 ** r.uniform(3, 5.5)), "images per environment", at_least=1),
        "lr": HParam(5e-5, log_uniform(10, -5.5, -4), "learning rate of AdamW, cosine to 0", at_least=0),
        "weight_decay": HParam(0.0, log_uniform(10, -6, -2), "weight decay of AdamW", at_least=0),
        "miro_weight": HParam(1.0, log_uniform(10, -2, 0), "lambda: weight of the penalty", at_least=0),
        "miro_var_lr_factor": HParam(10.0, help="learning rate of the variances, as a multiple of lr", at_least=0),
        "miro_released_pixels": HParam(False, help="squash images, normalise as for ImageNet, as the release does"),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h = self.hparams
        if h["miro_released_pixels"]:
            self.tower.normalise = Normalise()
        self.tower.all_tokens = True
        prompt_tokens, self.tower.prompt_tokens = self.tower.prompt_tokens, tuple  # not to copy those of the text side
        self.pretrained = copy.deepcopy(self.tower)  # stays frozen
        self.tower.prompt_tokens = prompt_tokens
        layers, width = len(self.tower.blocks), self.tower.class_embedding.shape[0]
        self.ends = sorted({-(-quarter * layers // 4) - 1 for quarter in (1, 2, 3, 4)})
        start = torch.tensor(VARIANCE - EPSILON).expm1().log().item()  # the inverse of softplus
        self.variance = nn.Parameter(torch.full((1 + len(self.ends), width), start))
        self.train_with(
            {"params": unfreeze(self.tower.parameters()), "lr": h["lr"], "weight_decay": h["weight_decay"]},
            {"params": [self.variance], "lr": h["lr"] * h["miro_var_lr_factor"], "weight_decay": 0.0},
        )

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        preprocess = super().preprocess(hparams, image_size)
        released = preprocess._replace(resize="squash", interpolation="bilinear")
        return released if hparams["miro_released_pixels"] else preprocess

    def backward(self, minibatches: list[Minibatch], weight: float) -> dict[str, Tensor]:
        """Add the gradients of `weight` times the sum of cross-entropy and the weighted penalty."""
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        trace: list[Trace] = []
        ce = F.cross_entropy(self.classify(self.encode(x, trace), count_images(minibatches)), y)
        penalty = self.hparams["miro_weight"] * self.compute_penalty(x, trace)
        backpropagate(weight * (ce + penalty))
        return {"ce": ce, "miro": penalty}

    def compute_penalty(self, x: Tensor, trace: list[Trace]) -> Tensor:
        """Return the distance of the features of images x in `trace` to the pretrained tower's."""
        with torch.no_grad():
            before: list[Trace] = []
            self.encode(x, before, self.pretrained)
        variances = F.softplus(self.variance) + EPSILON
        terms = []
        for f, f0, var in zip(self.select_features(trace), self.select_features(before), variances, strict=True):
            f = f[:, : f0.shape[1]]  # without the tokens of a text side, which are last
            terms.append(((f - f0).square() / var + var.log()).mean() / 2)
        return torch.stack(terms).sum()

    def select_features(self, trace: list[Trace]) -> list[Tensor]:
        return [trace[0].before, *(trace[i].output for i in self.ends)]

    def merge(self) -> dict[str, Tensor]:
        if self.hparams["miro_released_pixels"]:
            raise UsageError("MIRO with miro_released_pixels cannot be exported: it takes other pixels than its CLIP")
        return super().merge()
