"""Linear classifiers: weights that start at the text features, or at random."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.prompts.base import TEMPLATE_HPARAMS, TextSide, make_adamw, make_prompts

LINEAR_HPARAMS = {
    "prompt_lr": HParam(1e-3, log_uniform(10, -4, -2), "learning rate of AdamW, cosine to 0", at_least=0),
    "prompt_weight_decay": HParam(0.0, log_uniform(10, -6, -2), "weight decay of the classifier", at_least=0),
}


class FromText(TextSide):
    """The classifier of WiSE-FT (Wortsman et al., 2022): its weights start at the text features and train.

    Trainable parameters: C E.
    """

    CAPTURABLE = True
    HPARAMS = LINEAR_HPARAMS | TEMPLATE_HPARAMS

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.weight = nn.Parameter(clip.encode_prompts(make_prompts(class_names, hparams["template"])))

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        return self.weight  # not normalised: its length trains

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_adamw(self.parameters(), self.hparams)


class RandomLinear(TextSide):
    """A linear classifier with bias and random start, without text. Image features are not normalised, as in DomainBed.

    On a frozen tower it is a linear probe. Trainable parameters: C (E + 1).
    """

    CAPTURABLE = True
    HPARAMS = LINEAR_HPARAMS
    TEXT = False

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.classifier = nn.Linear(clip.embed_dim, len(class_names))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_adamw(self.parameters(), self.hparams)

    def forward(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(features)
        return logits
