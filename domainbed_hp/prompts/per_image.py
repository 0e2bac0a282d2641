"""Text features where every image, or every domain, has a prompt of its own."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainbed_hp.networks.text import Sentences, TextTower
from domainbed_hp.prompts.base import unit

SEQUENCES = 1024
"""Approximate number of sequences that the text tower reads at once."""


def encode_prompts(tower: TextTower, sentences: Sentences, prompts: Tensor) -> Tensor:
    """Return unit-norm text features (B, C, E) of B prompts of n vectors (B, n, W), each in all C sentences.

    To save memory, they are encoded in parts, whose activations the backward pass computes again.
    """

    def encode(part: Tensor) -> Tensor:
        return unit(tower(sentences(part[:, None]), sentences.ends))

    parts = prompts.split(max(1, SEQUENCES // len(sentences.tails)))
    if len(parts) > 1 and torch.is_grad_enabled() and prompts.requires_grad:
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])
    return torch.cat([encode(part) for part in parts])
