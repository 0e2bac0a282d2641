"""CLIP-LoRA (Zanella & Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR Workshops 2024)."""

from dataclasses import replace
from typing import Any

from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.heads import check_targets


class CLIPLoRA(ClipAlgorithm):
    """Low-rank changes alpha / sqrt(r) A B of W_q, W_k and W_v in every layer, with dropout on the input of A.

    Both towers are adapted with prompt=text_lora, the default; the image tower alone with prompt=template.
    Trainable parameters: 2 D r a projection; ViT-B/16 110,592, and 73,728 in the text tower.
    """

    # DEVIATION: the cosine schedule ends at 0, the release's at 1e-6.
    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | {
        "prompt": replace(CLIP_HPARAMS["prompt"], default="text_lora"),
        "clip_lora_rank": HParam(2, choice(2, 4, 8), "rank r of the adapters", at_least=1),
        "clip_lora_alpha": HParam(1.0, help="alpha: adapters are scaled by alpha / sqrt(r)", at_least=0),
        "clip_lora_dropout": HParam(0.25, help="dropout probability on the input of A", at_least=0, below=1),
        "clip_lora_targets": HParam("qkv", help="projections with adapters: any of the letters q, k, v, o"),
        "lr": HParam(2e-4, log_uniform(10, -5, -3), "learning rate of AdamW, cosine to 0", at_least=0),
        "weight_decay": HParam(0.01, log_uniform(10, -6, -2), "weight decay of AdamW", at_least=0),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h, rank = self.hparams, self.hparams["clip_lora_rank"]
        scale, dropout = h["clip_lora_alpha"] / rank**0.5, h["clip_lora_dropout"]
        adapters = self.tower.add_adapters(h["clip_lora_targets"], rank, rank, True, scale, dropout)
        self.train_with({"params": adapters, "lr": h["lr"], "weight_decay": h["weight_decay"]})

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        check_targets("clip_lora_targets", hparams["clip_lora_targets"], least=1)
