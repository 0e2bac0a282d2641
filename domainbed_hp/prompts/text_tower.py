"""A text tower that trains under a fixed template: in full (as in FLYP), or by low-rank changes (CLIP-LoRA)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.heads import check_targets
from domainbed_hp.networks.text import Sentences
from domainbed_hp.prompts.base import TEMPLATE_HPARAMS, TextSide, make_adamw, make_prompts, unit


class TunedTextTower(TextSide):
    """The zero-shot classifier, whose text tower trains without its token embeddings, most of which never occur."""

    # DEVIATION: FLYP (Goyal et al., 2023) trains the token embeddings as well.
    CAPTURABLE = True
    HPARAMS = TEMPLATE_HPARAMS | {
        "prompt_lr": HParam(1e-5, log_uniform(10, -6, -4), "learning rate of AdamW, cosine to 0", at_least=0),
        "prompt_weight_decay": HParam(0.1, log_uniform(10, -3, -0.5), "weight decay of the text tower", at_least=0),
    }

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.tower = clip.make_text_tower()
        self.sentences = Sentences(self.tower, "", 0, make_prompts(class_names, hparams["template"]))
        self.trained = self.unfreeze()

    def unfreeze(self) -> list[torch.nn.Parameter]:
        """Make the trained parameters require gradients and return them."""
        parameters = [p for name, p in self.tower.named_parameters() if not name.startswith("token_embedding")]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        no_vectors = self.tower.positional_embedding.new_empty(1, 0, self.tower.width)
        return unit(self.tower(self.sentences(no_vectors), self.sentences.ends))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_adamw(self.trained, self.hparams)

    def merge(self) -> dict[str, Tensor]:
        return self.tower.merge()


class TextLoRA(TunedTextTower):
    """Low-rank changes of W_q, W_k and W_v in every layer of the text tower (CLIP-LoRA, Zanella & Ben Ayed, 2024).

    They are scaled by alpha / sqrt(r) and have dropout. Trainable parameters: 2 W r a projection; ViT-B/16 73,728.
    """

    CAPTURABLE = True
    HPARAMS = TEMPLATE_HPARAMS | {
        "text_lora_rank": HParam(2, help="rank r of the adapters in the text tower", at_least=1),
        "text_lora_alpha": HParam(1.0, help="alpha: adapters are scaled by alpha / sqrt(r)", at_least=0),
        "text_lora_dropout": HParam(0.25, help="dropout probability on the input of A", at_least=0, below=1),
        "text_lora_targets": HParam("qkv", help="projections with adapters: any of the letters q, k, v, o"),
        "prompt_lr": HParam(2e-4, log_uniform(10, -5, -3), "learning rate of AdamW, cosine to 0", at_least=0),
        "prompt_weight_decay": HParam(0.01, log_uniform(10, -6, -2), "weight decay of the text tower", at_least=0),
    }

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        check_targets("text_lora_targets", hparams["text_lora_targets"], least=1)

    def unfreeze(self) -> list[torch.nn.Parameter]:
        h, rank = self.hparams, self.hparams["text_lora_rank"]
        scale = h["text_lora_alpha"] / rank**0.5
        return self.tower.add_adapters(h["text_lora_targets"], rank, True, scale, h["text_lora_dropout"])
