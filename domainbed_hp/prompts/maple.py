"""MaPLe (Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.text import Sentences
from domainbed_hp.networks.vit import VisionTower
from domainbed_hp.prompts.base import TextSide, make_prompts, make_sgd, unit
from domainbed_hp.prompts.coop import PROMPT_HPARAMS
from domainbed_hp.registry import UsageError

WORDS = "a photo of a"


class MaPLe(TextSide):
    """Prompts in the first J layers of both towers: M text vectors a layer, and their linear images in the image tower.

    A layer's prompts replace the outputs of those of the layer before. The first layer's text prompts replace the first
    words of "a photo of a name."; the other words stay, as in the release.
    Trainable parameters: J (M W + W D + D), D the width of the image tower; ViT-B/16 with M = 2, J = 9 3,555,072.
    """

    # DEVIATION: no epoch of constant learning rate before the cosine; every projection has its own random start, where
    # the release copies one to all layers behind the first.
    CAPTURABLE = True
    HPARAMS = PROMPT_HPARAMS | {
        "prompt_lr": HParam(
            3.5e-3, log_uniform(10, -4, -2), "learning rate of SGD, momentum 0.9, cosine to 0", at_least=0
        ),
        "prompt_tokens": HParam(2, choice(2, 4), "M: number of learned vectors per layer", at_least=1),
        "prompt_depth": HParam(9, help="J: layers with learned vectors, at most those of a tower", at_least=1),
    }
    CHANGES_TOWER = True

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.tower = clip.make_text_tower()
        tokens, width, vision_width = hparams["prompt_tokens"], self.tower.width, clip.visual.class_embedding.shape[0]
        depth = min(hparams["prompt_depth"], len(self.tower.blocks), len(clip.visual.blocks))

        words = WORDS.split()
        rest = " ".join([*words[tokens:], "{}."])
        self.sentences = Sentences(self.tower, "", tokens, make_prompts(class_names, rest))
        self.text_prompts = nn.ParameterList(0.02 * torch.randn(tokens, width) for _ in range(depth))
        start = self.tower.embed(" ".join(words[:tokens]))[:tokens]
        with torch.no_grad():
            self.text_prompts[0][: len(start)] = start
        self.projections = nn.ModuleList(nn.Linear(width, vision_width) for _ in range(depth))

    def attach(self, tower: VisionTower) -> None:
        if tower.prompt_tokens():
            raise UsageError("prompt=maple: the image tower already has prompts; use another prompt, e.g. prompt=coop")
        tower.prompt_tokens = self.compute_vision_prompts

    def compute_vision_prompts(self) -> list[Tensor]:
        """Return the image tower's prompts (M, D), one tensor a layer."""
        return [project(text) for project, text in zip(self.projections, self.text_prompts, strict=True)]

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        first, *deep = self.text_prompts
        return unit(self.tower(self.sentences(first[None]), self.sentences.ends, deep))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_sgd([*self.text_prompts, *self.projections.parameters()], self.hparams)
