"""VPT (Jia et al., "Visual Prompt Tuning", ECCV 2022), on CLIP as in MaPLe's comparison (Khattak et al., CVPR 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.prompts.base import load_text_side_class
from domainbed_hp.registry import UsageError


class VPT(ClipAlgorithm):
    """Learned tokens behind those of the image. deep: every layer has its own, in place of those of the layer before.

    Trainable parameters: n D per layer with tokens; ViT-B/16 73,728 deep, 6,144 shallow.
    """

    # DEVIATION: the tokens pass ln_pre and start as N(0, 0.02), as in MaPLe's code; VPT's own start is uniform.
    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | {
        "vpt_depth": HParam(
            "deep", choices=("deep", "shallow"), help="learned tokens in every layer, or in the first layer only"
        ),
        "vpt_tokens": HParam(8, choice(4, 8, 16), "n: number of learned tokens per layer", at_least=1),
        "lr": HParam(2.5e-3, log_uniform(10, -3.5, -1), "learning rate of SGD, momentum 0.9, cosine to 0", at_least=0),
        "weight_decay": HParam(5e-4, log_uniform(10, -6, -2), "weight decay of SGD", at_least=0),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h, width = self.hparams, self.tower.class_embedding.shape[0]
        layers = len(self.tower.blocks) if h["vpt_depth"] == "deep" else 1
        self.tokens = nn.Parameter(torch.empty(layers, h["vpt_tokens"], width))
        nn.init.normal_(self.tokens, std=0.02)
        self.tower.prompt_tokens = self.split_tokens
        self.optimizer = torch.optim.SGD([self.tokens], h["lr"], momentum=0.9, weight_decay=h["weight_decay"])
        self.schedule = self.make_cosine_schedule(self.optimizer)

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if load_text_side_class(hparams["prompt"]).CHANGES_TOWER:
            raise UsageError(f"VPT: prompt={hparams['prompt']} adds image tokens of its own: use FrozenCLIP")

    def split_tokens(self) -> Sequence[Tensor]:
        """Return the tokens (n, D) of each layer."""
        return self.tokens.unbind()
