"""FLYP (Goyal et al., "Finetune like you pretrain: Improved finetuning of zero-shot vision models", CVPR 2023)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.algorithms.clip_algorithm import backpropagate, count_images
from domainbed_hp.algorithms.fine_tune_clip import FineTuneCLIP
from domainbed_hp.prompts.base import compute_similarity, load_text_side_class, unit
from domainbed_hp.registry import UsageError


class FLYP(FineTuneCLIP):
    """Both towers train by CLIP's contrastive loss between the images of a batch and captions of their classes.

    Another image's caption is wrong, even one with the same words.
    The paper's ablation with cross-entropy in place of the contrastive loss is FineTuneCLIP with prompt=text_tower.
    Trainable parameters: the image tower and the text side; ViT-B/16 86,192,640 + 38,131,200.
    """

    # DEVIATION: T is CLIP's, where FLYP trains it. FLYP's batches have 256 or 512 images.
    CAPTURABLE = True
    HPARAMS = FineTuneCLIP.HPARAMS | {
        "prompt": replace(FineTuneCLIP.HPARAMS["prompt"], default="text_tower"),
        "lr": replace(FineTuneCLIP.HPARAMS["lr"], default=1e-5, help="learning rate of AdamW on the image tower"),
    }

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not load_text_side_class(hparams["prompt"]).TEXT:
            raise UsageError(f"FLYP: got prompt={hparams['prompt']}, which has no class texts: use prompt=text_tower")

    def backward(self, minibatches: list[Minibatch], weight: float) -> dict[str, Tensor]:
        """Add the gradients of `weight` times the contrastive loss: mean of image to caption and caption to image."""
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        images = unit(self.encode(x))
        captions = self.text.compute_class_features(images, count_images(minibatches))[..., y, :]  # (B, E) or (B, B, E)
        logits = self.logit_scale * compute_similarity(images, captions)
        targets = torch.arange(len(y), device=y.device)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        backpropagate(weight * loss)
        return {"contrastive": loss}
