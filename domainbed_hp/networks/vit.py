"""CLIP's image tower on our own attention: open_clip's modules, weights and parameter names, our own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU as StockQuickGELU
from torch import Tensor, nn

from domainbed_hp.networks.heads import GateKind, HeadAttention
from domainbed_hp.networks.preprocess import Normalise
from domainbed_hp.seeds import rng

LAST_LAYERS = 2
"""How many layers at the end take `rank_last`."""


class Trace(NamedTuple):
    """What one layer computed: the residual stream before and after it, and in between what became of the class token:
    its heads' outputs before gating, detached, and the residual stream after attention."""

    before: Tensor
    """(B, N, D)"""
    heads: Tensor
    """(B, 1, H, Dh)"""
    attended: Tensor
    """(B, 1, D)"""
    output: Tensor
    """(B, N, D); in the last layer (B, 1, D), unless `VisionTower.every_token`"""


class Silu(torch.autograd.Function):
    """silu(a x) / a, whose gradient is silu'(a x): one pass over the widest activations, of which one is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: float) -> Tensor:
        x = a * x
        ctx.save_for_backward(x)
        return F.silu(x).div_(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x), None


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's GELU."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Silu.apply(x, 1.702)
        return y


class Block(nn.Module):
    """A pre-norm transformer block that takes over open_clip's, with `HeadAttention`."""

    def __init__(self, pretrained: Any, causal: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ls_1 = pretrained.ln_1, pretrained.ls_1
        self.attn = HeadAttention(pretrained.attn, causal)
        self.ln_2, self.mlp, self.ls_2 = pretrained.ln_2, pretrained.mlp, pretrained.ls_2
        if isinstance(self.mlp.gelu, StockQuickGELU):
            self.mlp.gelu = QuickGELU()

    def heads(self, x: Tensor, first: int | None = None) -> Tensor:
        """The heads' outputs on the residual stream x, (B, N, D) -> (B, N, H, Dh); see `HeadAttention.heads`."""
        return self.attn.heads(self.ln_1(x), first)

    def attend(self, x: Tensor, heads: Tensor) -> Tensor:
        """The residual stream after attention, (B, N, D)."""
        y: Tensor = x + self.ls_1(self.attn.project(heads))
        return y

    def forward(self, x: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream x (B, N, D) after this layer, with `first` that of the first tokens alone; and of the
        first one `Trace.heads` and `Trace.attended`."""
        heads = self.heads(x, first)
        after = self.attend(x[:, :first], heads)
        y: Tensor = after + self.ls_2(self.mlp(self.ln_2(after)))
        return y, heads[:, :1].detach(), after[:, :1]


class VisionTower(nn.Module):
    """Images in [0, 1] -> image features; state dict keys are open_clip's below `visual.`, adapters and gates aside."""

    def __init__(self, pretrained: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.conv1, self.ln_pre = pretrained.conv1, pretrained.ln_pre
        self.class_embedding, self.positional_embedding = pretrained.class_embedding, pretrained.positional_embedding
        self.ln_post, self.proj = pretrained.ln_post, pretrained.proj
        blocks = nn.ModuleList(Block(b) for b in pretrained.transformer.resblocks)
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.normalise = Normalise(mean, std)
        self.prompts: Callable[[], Sequence[Tensor]] = tuple
        """Tokens (n, D) that stand behind the image's from the first layer on; the next ones replace them in the
        second, and so on. Whoever sets it owns them."""
        self.every_token = False
        """The last layer computes what becomes of every token, for who reads them in a trace; the feature needs one."""

    @property
    def blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.transformer["resblocks"])

    @property
    def embed_dim(self) -> int:
        """E, the size of an image feature."""
        return int(self.proj.shape[1])

    def forward(self, x: Tensor, trace: list[Trace] | None = None) -> Tensor:
        """x (B, 3, S, S) -> image features (B, E), not unit-norm; appends one `Trace` a layer to `trace`."""
        x = self.conv1(self.normalise(x)).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)  # (B, N, D)
        x = x + self.positional_embedding.to(x.dtype)
        prompts = self.prompts()
        if prompts:
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1).to(x.dtype)], dim=1)
        x = self.ln_pre(x)
        for i, block in enumerate(self.blocks):
            if 0 < i < len(prompts):
                x = torch.cat([x[:, : -len(prompts[i])], prompts[i].expand(len(x), -1, -1).to(x.dtype)], dim=1)
            first = None if self.every_token or i < len(self.blocks) - 1 else 1
            before = x
            x, heads, attended = block(x, first)
            if trace is not None:
                trace.append(Trace(before, heads, attended, x))
        features: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return features

    def add_adapters(
        self, targets: str, rank: int, rank_last: int, shared: bool = False, scale: float = 1.0, dropout: float = 0.0
    ) -> list[nn.Parameter]:
        """HA-LoRA (or LoRA, `shared`) in every layer, with `rank_last` in the last two; returns the new parameters."""
        for i, block in enumerate(self.blocks):
            r = rank_last if i >= len(self.blocks) - LAST_LAYERS else rank
            block.attn.add_adapters(targets, r, shared, scale, dropout)
        return [p for block in self.blocks for p in block.attn.adapters.parameters()]

    def add_gates(self, kind: GateKind, keep: int) -> list[nn.Parameter]:
        """A gate for every head; returns the new parameters, one a layer."""
        for block in self.blocks:
            block.attn.add_gate(kind, keep)
        return [block.attn.gate.gate_logits for block in self.blocks if block.attn.gate is not None]

    def shuffle_gates(self) -> None:
        """In evaluation, give each head of a layer another head's gate: one fixed permutation a layer."""
        for i, block in enumerate(self.blocks):
            if block.attn.gate is not None:
                block.attn.gate.shuffle = torch.from_numpy(rng("shuffle_gates", i).permutation(block.attn.num_heads))

    def gates(self) -> Tensor:
        """The gates, (layers, H); 1 where there are none."""
        return torch.stack(
            [b.attn.gate() if b.attn.gate is not None else torch.ones(b.attn.num_heads) for b in self.blocks]
        ).detach()

    def merge(self) -> dict[str, Tensor]:
        """A plain state dict with open_clip's own names below `visual.`: adapters and gates are folded into it."""
        state = {k: v.clone() for k, v in self.state_dict().items() if ".adapters." not in k and ".gate." not in k}
        for i, block in enumerate(self.blocks):
            state |= {f"transformer.resblocks.{i}.attn.{k}": v for k, v in block.attn.merge().items()}
        return {f"visual.{k}": v for k, v in state.items()}
