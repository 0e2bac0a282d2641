"""DUPRG (Niu et al., "Domain-Unified Prompt Representations for Source-Free Domain Generalization", 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.prompts.base import unit
from domainbed_hp.prompts.text_only import TextOnly

DOMAINS = ["photo", "art", "cartoon", "sketch", "clipart", "infograph", "painting", "quickdraw", "real", "product"]
PROMPTS = ["a photo of a {}", *(f"a {domain} photo of a {{}}" for domain in DOMAINS)]
"""Prompts of the bank of domains that the paper names "Combined"."""


class AutoEncoder(nn.Sequential):
    """Auto-encoder E -> 512 -> 512 -> 256 -> 512 -> 512 -> E with ReLU, none at the 256, and unit-norm output.

    Trainable parameters: 1,025 E + 788,736; ViT-B/16 1,313,536.
    """

    def __init__(self, size: int) -> None:
        encoder = [nn.Linear(size, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256)]
        decoder = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, size)]
        super().__init__(*encoder, *decoder)

    def forward(self, x: Tensor) -> Tensor:
        return unit(super().forward(x))


class DUPRG(TextOnly):
    """An auto-encoder removes the domain from text features of prompts "a {domain} photo of a {class}".

    L = -cos(input, output) - a <output, mean of its class's outputs> + b cos(outputs of two classes, same domain).
    The feature of a class is the mean of its outputs over the 11 prompts. Nothing trains on images.
    """

    # DEVIATION: the release does not replace the underscores of class names, nor normalise the mean of the outputs.
    # DEVIATION: it scores the test images after every epoch and reports the best, an oracle. Ours is the last epoch.
    # With duprg_per_step, records show other epochs, under the cosine schedule of every text side.
    HPARAMS = {
        "duprg_lr": HParam(
            0.04,
            log_uniform(10, -3, -1),
            "learning rate of AdamW; constant, or with duprg_per_step a cosine",
            at_least=0,
        ),
        "duprg_weight_decay": HParam(1e-4, log_uniform(10, -6, -2), "weight decay of AdamW", at_least=0),
        "duprg_epochs": HParam(2000, help="number of epochs; an epoch is one step on all prompts", at_least=0),
        "duprg_intra": HParam(0.5, log_uniform(10, -1.5, 0.5), "weight a: unites the domains of a class", at_least=0),
        "duprg_inter": HParam(0.05, log_uniform(10, -2, 0), "weight b: pushes classes apart", at_least=0),
        "duprg_per_step": HParam(False, help="train one epoch at each training step, not all before the first step"),
    }

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        names = [name.replace("_", " ") for name in class_names]
        bank = clip.encode_prompts([prompt.format(name) for name in names for prompt in PROMPTS])
        self.register_buffer("bank", bank.unflatten(0, (len(names), len(PROMPTS))), persistent=False)  # (C, 11, E)
        self.bank: Tensor
        self.autoencoder = AutoEncoder(clip.embed_dim) if hparams["duprg_per_step"] else None

    @classmethod
    def trains(cls, hparams: dict[str, Any]) -> bool:
        return bool(hparams["duprg_per_step"])

    def compute_loss(self, outputs: Tensor) -> Tensor:
        """Return L of unit-norm outputs (C, 11, E) for the bank."""
        reconstruction = -(self.bank * outputs).sum(-1).mean()
        intra = -(outputs * outputs.mean(1, keepdim=True)).sum(-1).mean()
        cosines = torch.einsum("cde,kde->dck", outputs, outputs)
        count = len(outputs)
        # All but the diagonal, which is the first column of rows of C + 1. A mask would wait for the device.
        others = cosines.flatten(1)[:, :-1].unflatten(1, (count - 1, count + 1))[..., 1:] if count > 1 else None
        inter = 0.0 if others is None else others.mean()
        loss: Tensor = reconstruction + self.hparams["duprg_intra"] * intra + self.hparams["duprg_inter"] * inter
        return loss

    def make_adamw(self, autoencoder: AutoEncoder) -> torch.optim.Optimizer:
        h = self.hparams
        return torch.optim.AdamW(autoencoder.parameters(), h["duprg_lr"], weight_decay=h["duprg_weight_decay"])

    def fit(self) -> Tensor:
        autoencoder = AutoEncoder(self.bank.shape[-1]).to(self.bank)
        optimizer = self.make_adamw(autoencoder)
        for _ in tqdm(range(self.hparams["duprg_epochs"]), "DUPRG", disable=None, unit="epoch"):
            optimizer.zero_grad()
            self.compute_loss(autoencoder(self.bank)).backward()
            optimizer.step()
        features: Tensor = autoencoder(self.bank).mean(1)
        return features

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        if self.autoencoder is None:
            return super().encode(images, sizes)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # images do not train it
            return unit(self.autoencoder(self.bank).mean(1))

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        return None if self.autoencoder is None else self.make_adamw(self.autoencoder)

    def backward(self) -> dict[str, Tensor]:
        if self.autoencoder is None:
            return {}
        with torch.autocast(self.bank.device.type, enabled=False):
            loss = self.compute_loss(self.autoencoder(self.bank))
        if loss.requires_grad:
            loss.backward()
        return {"duprg": loss.detach()}
