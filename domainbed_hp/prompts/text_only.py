"""What the source-free text sides share: a classifier that is trained on text alone, once, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.networks.clip import Clip
from domainbed_hp.prompts.base import TextSide, unit


class TextOnly(TextSide):
    """`fit` makes text features of class names when they are first asked for; no image is seen.

    Not when it is built, since by then it has moved to where it is fast, and a loaded one needs no fit.
    """

    TRAINS = False
    SOURCE_FREE = True

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("features", torch.zeros(len(class_names), clip.embed_dim))
        self.seed: Tensor
        self.fitted: Tensor
        self.features: Tensor
        self.seen_fitted: int | None = None
        self.helpers: list[nn.Module] = []
        """What only `fit` needs. In a list they are no children: neither trained nor saved."""

    def fit(self) -> Tensor:
        """The class features (C, E) of any length, trained from text; random draws are the CPU generator's."""
        raise NotImplementedError(f"{type(self).__name__}.fit")

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        if self.seen_fitted != self.fitted._version:  # asked once: a step that asks waits for the device
            if not self.fitted:
                self.fit_once(images.device)
            self.seen_fitted = self.fitted._version
            self.helpers.clear()
        return self.features

    def fit_once(self, device: torch.device) -> None:
        """Fill `features`, whatever the caller does with gradients, precision and random numbers."""
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            torch.default_generator.manual_seed(int(self.seed))  # the CPU's alone, which `fork_rng` gives back
            with torch.inference_mode(False), torch.enable_grad():
                for helper in self.helpers:
                    helper.to(device, self.features.dtype)
                features = self.fit().detach()
        self.features.copy_(unit(features))
        self.fitted.fill_(True)
