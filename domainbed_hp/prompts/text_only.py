"""The base of the source-free text sides: a classifier that trains on text alone, once, and is then frozen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.networks.clip import Clip
from domainbed_hp.prompts.base import TextSide, unit


class TextOnly(TextSide):
    """Text features that `fit` trains from class names at their first use, when the module is on its device."""

    TRAINS = False
    SOURCE_FREE = True

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("features", torch.zeros(len(class_names), clip.embed_dim))
        self.seed: Tensor
        self.fitted: Tensor
        self.checked_version: int | None = None
        self.helpers: list[nn.Module] = []
        """Modules that only `fit` needs. In a list, not as submodules, they are neither trained nor saved."""

    def fit(self) -> Tensor:
        """Return class features (C, E) of any length, trained on text by draws of the CPU's generator."""
        raise NotImplementedError(f"{type(self).__name__}.fit")

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        if self.checked_version != self.fitted._version:  # reading `fitted` at every step would wait for the device
            if not self.fitted:
                self.fit_once(images.device)
            self.checked_version = self.fitted._version
            self.helpers.clear()
        return self.features

    def fit_once(self, device: torch.device) -> None:
        """Fill `features`, independent of the caller's gradient mode, precision and random generators."""
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            torch.default_generator.manual_seed(int(self.seed))  # the CPU's generator only, which `fork_rng` restores
            with torch.inference_mode(False), torch.enable_grad():
                for helper in self.helpers:
                    helper.to(device, self.features.dtype)
                features = self.fit().detach()
        self.features.copy_(unit(features))
        self.fitted.fill_(True)
