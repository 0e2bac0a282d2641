"""CLIP's text tower with `HeadAttention`, which reads the embeddings of tokens or learned vectors."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from domainbed_hp.networks.vit import Block
from domainbed_hp.registry import UsageError


class TextTower(nn.Module):
    """Sequences of embeddings -> text features. Parameter names are open_clip's.

    Shapes: n sequences of L tokens, width W, features E.
    """

    def __init__(self, pretrained: Any, tokenizer: Any, random: bool = False) -> None:
        super().__init__()
        self.random = random  # random weights cannot be loaded again
        pool = getattr(pretrained, "text_pool_type", None)
        if pool not in ("argmax", "eos") or pretrained.attn_mask is None or not hasattr(tokenizer, "eot_token_id"):
            raise UsageError(
                "this prompt needs a text tower that reads from left to right and ends with its end-of-text token, as "
                "OpenAI's; got another. Use prompt=template or prompt=ensemble"
            )
        self.tokenizer = tokenizer
        self.token_embedding, self.positional_embedding = pretrained.token_embedding, pretrained.positional_embedding
        blocks = nn.ModuleList(Block(b, causal=True) for b in pretrained.transformer.resblocks)
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final, self.text_projection = pretrained.ln_final, pretrained.text_projection

    @property
    def blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.transformer["resblocks"])

    @property
    def width(self) -> int:
        return int(self.positional_embedding.shape[1])

    @property
    def context_length(self) -> int:
        return int(self.positional_embedding.shape[0])

    def tokenize(self, text: str) -> Tensor:
        """Return the token numbers of a text, without start and end."""
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)

    def embed(self, text: str) -> Tensor:
        """Return the embeddings (L, W) of a text, without start and end, detached."""
        embedded: Tensor = self.token_embedding(self.tokenize(text).to(self.positional_embedding.device))
        return embedded.detach()

    def forward(self, embedded: Tensor, ends: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Return text features (..., E), not unit-norm, of embeddings (..., L, W) whose end tokens are at `ends` (...).

        `deep`: one tensor (n, W) for each layer from the second on, which replaces the tokens behind the start.
        """
        *many, length, width = embedded.shape
        x = embedded.reshape(-1, length, width) + self.positional_embedding[:length]
        for i, block in enumerate(self.blocks):
            if 0 < i <= len(deep):
                new = deep[i - 1].expand(len(x), -1, -1).to(x.dtype)
                x = torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
            x, *_ = block(x)
        x = x[torch.arange(len(x), device=x.device), ends.expand(many).reshape(-1)]
        x = self.ln_final(x)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        features: Tensor = x.unflatten(0, many) if len(many) != 1 else x
        return features

    def add_adapters(
        self, targets: str, rank: int, shared: bool = False, scale: float = 1.0, dropout: float = 0.0
    ) -> list[nn.Parameter]:
        """Add HA-LoRA (or LoRA, `shared`) to every layer. Return the new parameters."""
        for block in self.blocks:
            block.attn.add_adapters(targets, rank, shared, scale, dropout)
        return [p for block in self.blocks for p in block.attn.adapters.parameters()]

    def merge(self) -> dict[str, Tensor]:
        """Return a state dict with open_clip's names, adapters folded into the weights."""
        state = {k: v.clone() for k, v in self.state_dict().items() if ".adapters." not in k}
        for i, block in enumerate(self.blocks):
            state |= {f"transformer.resblocks.{i}.attn.{k}": v for k, v in block.attn.merge().items()}
        return state


class Sentences(nn.Module):
    """Embedded sentences with a gap for vectors: start, `before`, the gap, one text of `after`, end.

    Shapes: C sentences, n vectors in the gap.
    """

    def __init__(self, tower: TextTower, before: str, gap: int, after: Sequence[str]) -> None:
        super().__init__()
        start, end = ([token] for token in (tower.tokenizer.sot_token_id, tower.tokenizer.eot_token_id))
        embedding = tower.token_embedding.weight.detach()
        head = torch.cat([torch.tensor(start), tower.tokenize(before)])
        tails = [torch.cat([tower.tokenize(text), torch.tensor(end)]) for text in after]
        self.gap, self.at = gap, len(head)
        longest = self.at + gap + max(map(len, tails))
        if longest > tower.context_length:
            raise UsageError(
                f"a prompt has {longest} tokens, the text tower reads at most {tower.context_length}: use shorter "
                "class names, a shorter template, or fewer prompt_tokens"
            )
        buffers = {
            "head": embedding[head].clone(),  # (at, W)
            "tails": embedding[pad_sequence(tails, batch_first=True)],  # (C, _, W)
            "ends": self.at + gap - 1 + torch.tensor([len(tail) for tail in tails]),  # (C,)
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=tower.random)
        self.head: Tensor
        self.tails: Tensor
        self.ends: Tensor

    def forward(self, vectors: Tensor) -> Tensor:
        """Return sentences (..., C, L, W) with vectors (..., C or 1, n, W) in the gap. They end at `ends` (C,)."""
        *many, _, _, width = vectors.shape
        vectors = vectors.expand(*many, len(self.tails), self.gap, width)
        head, tails = self.head.expand(*many, len(self.tails), -1, -1), self.tails.expand(*many, -1, -1, -1)
        return torch.cat([head.to(vectors.dtype), vectors, tails.to(vectors.dtype)], dim=-2)
