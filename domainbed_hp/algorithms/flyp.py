"""FLYP (Goyal et al., "Finetune like you pretrain: Improved finetuning of zero-shot vision models", CVPR 2023)."""

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
from domainbed_hp.registry import PROMPTS, UsageError


class FLYP(FineTuneCLIP):
    """Both towers train by CLIP's own contrastive loss, between the batch's images and captions of their classes.

    Every image has one caption right, its own; another image's caption is wrong even where it says the same.
    The ablation of the paper, cross-entropy in its place, is FineTuneCLIP with prompt=text_tower.
    Trainable parameters: the image tower and the text side; ViT-B/16 86,192,640 + 38,131,200.
    """

    # DEVIATION: T stays CLIP's, where FLYP trains it; batches are ours, FLYP's have 256 or 512 images.
    CAPTURABLE = True
    HPARAMS = FineTuneCLIP.HPARAMS | {
        "prompt": HParam("text_tower", plugins=PROMPTS, help="the text side"),
        "lr": HParam(1e-5, log_uniform(10, -6, -4), "of the image tower: AdamW, cosine to 0", at_least=0),
    }

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not prompt_class(hparams["prompt"]).TEXT:
            raise UsageError(f"FLYP contrasts images with text, prompt={hparams['prompt']} has none: use text_tower")

    def losses(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """The mean of images choosing captions and captions choosing images."""
        x, y = join(minibatches)
        images = unit(self.encode(x))
        captions = self.text.class_features(images, sizes(minibatches))[..., y, :]  # (B, E) or (B, B, E)
        logits = self.logit_scale * similarity(images, captions)
        own = torch.arange(len(y), device=y.device)
        return {"contrastive": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2}
