"""CoOp: context optimization (Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.text import Sentences
from domainbed_hp.prompts.base import TextSide, make_prompts, make_sgd, unit

PROMPT_HPARAMS = {
    "prompt_lr": HParam(2e-3, log_uniform(10, -4, -2), "learning rate of SGD, momentum 0.9, cosine to 0", at_least=0),
    "prompt_weight_decay": HParam(5e-4, log_uniform(10, -6, -2), "weight decay of the text side", at_least=0),
}


class CoOp(TextSide):
    """The prompt of a class is [V_1] ... [V_M] name. (equation 2): M vectors that train, shared by all classes.

    Trainable parameters: M W, W the width of the text tower; ViT-B/16 with 16 vectors 8,192.
    """

    # DEVIATION: no epoch of constant learning rate before the cosine.
    CAPTURABLE = True
    HPARAMS = PROMPT_HPARAMS | {
        "prompt_tokens": HParam(16, choice(4, 8, 16), "M: number of learned vectors before the class name", at_least=1)
    }

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.tower = clip.make_text_tower()
        self.sentences = Sentences(self.tower, "", hparams["prompt_tokens"], make_prompts(class_names, "{}."))
        self.context = nn.Parameter(torch.empty(hparams["prompt_tokens"], self.tower.width))
        nn.init.normal_(self.context, std=0.02)

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        return unit(self.tower(self.sentences(self.context[None]), self.sentences.ends))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_sgd([self.context], self.hparams)
