"""CLIPood (Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions", ICML 2023)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms.base import Minibatch, join
from domainbed_hp.algorithms.clip_algorithm import sizes
from domainbed_hp.algorithms.fine_tune_clip import FineTuneCLIP
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.prompts.base import prompt_class, similarity, unit
from domainbed_hp.registry import WEIGHT_AVERAGES, UsageError


class CLIPood(FineTuneCLIP):
    """Fine-tuning by a margin metric softmax: classes far from the right one, as text goes, must be further off.

    logits_j = T (<I, t_j> - margin <t_y, t_j>) in the loss. The weights that are scored are averaged over training,
    by a Beta distribution. Trainable parameters: the image tower; ViT-B/16 86,192,640.
    """

    CAPTURABLE = True
    HPARAMS = FineTuneCLIP.HPARAMS | {
        "margin": HParam(0.3, lambda r: r.uniform(0.1, 0.5), "lambda, factor of the text's own cosines", at_least=0),
        "average": HParam("beta", plugins=WEIGHT_AVERAGES, help="weights over time that are scored: none, or a name"),
    }

    @classmethod
    def hparams_for(cls, dataset: str) -> dict[str, HParam]:
        if dataset not in ("OfficeHome", "DomainNet"):
            return cls.HPARAMS
        return cls.HPARAMS | {"lr": HParam(1e-5, log_uniform(10, -6, -4), cls.HPARAMS["lr"].help, at_least=0)}

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not prompt_class(hparams["prompt"]).TEXT:
            raise UsageError(f"CLIPood's margin is between texts, prompt={hparams['prompt']} has none: use template")

    def losses(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        x, y = join(minibatches)
        images = unit(self.encode(x))
        text = self.text.class_features(images, sizes(minibatches))  # (C, E) or (B, C, E)
        fixed = unit(text.detach())  # a text side that trains could shrink its own margins
        right = fixed[y] if fixed.dim() == 2 else fixed[torch.arange(len(y), device=y.device), y]
        margins = self.hparams["margin"] * similarity(right, fixed)
        return {"ce": F.cross_entropy(self.logit_scale * (similarity(images, text) - margins), y)}
