"""CoCoOp (Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.text import Sentences
from domainbed_hp.prompts.base import TextSide, make_prompts, make_sgd
from domainbed_hp.prompts.coop import PROMPT_HPARAMS
from domainbed_hp.prompts.per_image import encode_prompts
from domainbed_hp.registry import UsageError


class CoCoOp(TextSide):
    """The prompt of a class is [V_1 + m(x)] ... [V_M + m(x)] name.: a small net m shifts CoOp's vectors by the image.

    The vectors start as the words `prompt_init`; m is Linear(E, E / 16), ReLU, Linear(E / 16, W) on the unit-norm image
    feature. Every image needs C sentences of its own, which is slow with many classes.
    Trainable parameters: M W + E (E / 16) + E / 16 + (E / 16) W + W; ViT-B/16 with 4 vectors 35,360.
    """

    # DEVIATION: no epoch of constant learning rate before the cosine; batches are those of the image side, where
    # CoCoOp's hold one image to save memory.
    HPARAMS = PROMPT_HPARAMS | {
        "prompt_init": HParam("a photo of a", help="initial words of the learned vectors, one vector per token")
    }
    PER_IMAGE = True

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.tower = clip.make_text_tower()
        self.context = nn.Parameter(self.tower.embed(hparams["prompt_init"]))  # (M, W)
        self.sentences = Sentences(self.tower, "", len(self.context), make_prompts(class_names, "{}."))
        hidden = clip.embed_dim // 16
        self.meta_net = nn.Sequential(nn.Linear(clip.embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, self.tower.width))

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        if not hparams["prompt_init"].strip():
            raise UsageError("prompt_init is empty, expected words such as 'a photo of a', one vector per token")

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        return encode_prompts(self.tower, self.sentences, self.context + self.meta_net(images)[:, None])

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_sgd([self.context, *self.meta_net.parameters()], self.hparams)
