"""CLIPood (Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions", ICML 2023)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.algorithms.clip_algorithm import backpropagate, count_images
from domainbed_hp.algorithms.fine_tune_clip import FineTuneCLIP
from domainbed_hp.hparams_registry import TRAINING_HPARAMS, HParam, log_uniform
from domainbed_hp.prompts.base import compute_similarity, load_text_side_class, unit
from domainbed_hp.registry import UsageError


class CLIPood(FineTuneCLIP):
    """Fine-tuning by a margin metric softmax: in the loss, logits_j = T (<I, t_j> - margin <t_y, t_j>).

    The scored weights are an average over training, weighted by a Beta distribution.
    Trainable parameters: the image tower; ViT-B/16 86,192,640.
    """

    CAPTURABLE = True
    HPARAMS = FineTuneCLIP.HPARAMS | {
        "lr": replace(
            FineTuneCLIP.HPARAMS["lr"],
            by_dataset=dict.fromkeys(("OfficeHome", "DomainNet"), HParam(1e-5, log_uniform(10, -6, -4))),
        ),
        "margin": HParam(0.3, lambda r: r.uniform(0.1, 0.5), "lambda: weight of the texts' cosines", at_least=0),
        "average": replace(TRAINING_HPARAMS["average"], default="beta"),
    }

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not load_text_side_class(hparams["prompt"]).TEXT:
            raise UsageError(f"CLIPood: got prompt={hparams['prompt']}, which has no class texts: use prompt=template")

    def backward(self, minibatches: list[Minibatch], weight: float) -> dict[str, Tensor]:
        """Add the gradients of `weight` times the margin metric softmax."""
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        images = unit(self.encode(x))  # (B, E)
        text = self.text.compute_class_features(images, count_images(minibatches))  # (C, E) or (B, C, E)
        fixed = unit(text.detach())  # a text side that trains could shrink its own margins
        right = fixed[y] if fixed.dim() == 2 else fixed[torch.arange(len(y), device=y.device), y]  # (B, E)
        margins = self.hparams["margin"] * compute_similarity(right, fixed)  # (B, C)
        ce = F.cross_entropy(self.logit_scale * (compute_similarity(images, text) - margins), y)
        backpropagate(weight * ce)
        return {"ce": ce}
