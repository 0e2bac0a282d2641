"""Text features of many prompts: where each image, or each domain, has its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainbed_hp.networks.text import Sentences, TextTower
from domainbed_hp.prompts.base import unit

SEQUENCES = 1024
"""About how many the text tower reads at once."""


def encode_each(tower: TextTower, sentences: Sentences, prompts: Tensor) -> Tensor:
    """B prompts of n vectors (B, n, W), each in all C sentences -> unit-norm text features (B, C, E).

    B C sequences are many: they go in parts, and training keeps no activations of a part but encodes it again in its
    backward pass. The result is the same.
    """

    def encode(part: Tensor) -> Tensor:
        return unit(tower(sentences(part[:, None]), sentences.ends))

    parts = prompts.split(max(1, SEQUENCES // len(sentences.tails)))
    if len(parts) > 1 and torch.is_grad_enabled() and prompts.requires_grad:
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])
    return torch.cat([encode(part) for part in parts])
