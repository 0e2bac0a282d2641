"""CLIP's image tower with `HeadAttention`: open_clip's modules and parameter names with another forward pass."""

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
"""Number of layers at the end of the tower whose adapters have rank `rank_last`."""


class Trace(NamedTuple):
    """Intermediate values of one layer. N tokens, H heads of size Dh, width D."""

    before: Tensor
    """Residual stream that enters the layer (B, N, D)."""
    heads: Tensor
    """Heads' outputs for the class token before gating, detached (B, 1, H, Dh)."""
    attended: Tensor
    """Residual stream of the class token after attention (B, 1, D)."""
    output: Tensor
    """Residual stream that leaves the layer (B, N, D); in the last layer (B, 1, D), unless `VisionTower.all_tokens`."""


class Silu(torch.autograd.Function):
    """silu(a x) / a, whose gradient is silu'(a x), in one pass that saves one tensor."""

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
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Silu.apply(x, 1.702)
        return y


class Block(nn.Module):
    """A pre-norm transformer block with `HeadAttention`, made of the modules of open_clip's block."""

    def __init__(self, pretrained: Any, causal: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ls_1 = pretrained.ln_1, pretrained.ls_1
        self.attn = HeadAttention(pretrained.attn, causal)
        self.ln_2, self.mlp, self.ls_2 = pretrained.ln_2, pretrained.mlp, pretrained.ls_2
        if isinstance(self.mlp.gelu, StockQuickGELU):
            self.mlp.gelu = QuickGELU()

    def compute_heads(self, x: Tensor, first: int | None = None) -> Tensor:
        """Return the heads' outputs for the residual stream x, (B, N, D) -> (B, N, H, Dh), before gating."""
        return self.attn.compute_heads(self.ln_1(x), first)

    def add_attention(self, x: Tensor, heads: Tensor) -> Tensor:
        """Return the residual stream after attention, (B, N, D)."""
        y: Tensor = x + self.ls_1(self.attn.project_heads(heads))
        return y

    def forward(self, x: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream (B, N, D) after this layer, and the `heads` and `attended` of its `Trace`.

        With `first`, only so many tokens of the result are computed.
        """
        heads = self.compute_heads(x, first)
        after = self.add_attention(x[:, :first], heads)
        y: Tensor = after + self.ls_2(self.mlp(self.ln_2(after)))
        return y, heads[:, :1].detach(), after[:, :1]


class VisionTower(nn.Module):
    """CLIP's image tower: images in [0, 1] -> image features.

    The state dict has open_clip's keys below `visual.`, and those of adapters and gates.
    """

    def __init__(self, pretrained: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.conv1, self.ln_pre = pretrained.conv1, pretrained.ln_pre
        self.class_embedding, self.positional_embedding = pretrained.class_embedding, pretrained.positional_embedding
        self.ln_post, self.proj = pretrained.ln_post, pretrained.proj
        blocks = nn.ModuleList(Block(b) for b in pretrained.transformer.resblocks)
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.normalise = Normalise(mean, std)
        self.prompt_tokens: Callable[[], Sequence[Tensor]] = tuple
        """Function that returns learned tokens (n, D), one tensor a layer. The first layer gets them behind the image's
        tokens, each later layer in place of the outputs of the layer before."""
        self.all_tokens = False
        """True: the last layer computes all tokens, not the class token alone."""

    @property
    def blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.transformer["resblocks"])

    @property
    def embed_dim(self) -> int:
        """Size E of an image feature."""
        return int(self.proj.shape[1])

    def forward(self, x: Tensor, trace: list[Trace] | None = None) -> Tensor:
        """Return image features (B, E), not unit-norm, of x (B, 3, S, S). Each layer appends a `Trace` to `trace`."""
        x = self.conv1(self.normalise(x)).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)  # (B, N, D)
        x = x + self.positional_embedding.to(x.dtype)
        prompts = self.prompt_tokens()
        if prompts:
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1).to(x.dtype)], dim=1)
        x = self.ln_pre(x)
        for i, block in enumerate(self.blocks):
            if 0 < i < len(prompts):
                x = torch.cat([x[:, : -len(prompts[i])], prompts[i].expand(len(x), -1, -1).to(x.dtype)], dim=1)
            first = None if self.all_tokens or i < len(self.blocks) - 1 else 1
            before = x
            x, heads, attended = block(x, first)
            if trace is not None:
                trace.append(Trace(before, heads, attended, x))
        features: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return features

    def add_adapters(
        self, targets: str, rank: int, rank_last: int, shared: bool = False, scale: float = 1.0, dropout: float = 0.0
    ) -> list[nn.Parameter]:
        """Add HA-LoRA (or LoRA, `shared`) to every layer, `rank_last` in the last two. Return the parameters."""
        for i, block in enumerate(self.blocks):
            r = rank_last if i >= len(self.blocks) - LAST_LAYERS else rank
            block.attn.add_adapters(targets, r, shared, scale, dropout)
        return [p for block in self.blocks for p in block.attn.adapters.parameters()]

    def add_gates(self, kind: GateKind, open_heads: int) -> list[nn.Parameter]:
        """Add a gate for every head. Return the new parameters, one a layer."""
        for block in self.blocks:
            block.attn.add_gate(kind, open_heads)
        return [block.attn.gate.gate_logits for block in self.blocks if block.attn.gate is not None]

    def shuffle_gates(self) -> None:
        """Permute the gates of each layer in evaluation, by one fixed permutation a layer."""
        for i, block in enumerate(self.blocks):
            if block.attn.gate is not None:
                block.attn.gate.shuffle = torch.from_numpy(rng("shuffle_gates", i).permutation(block.attn.num_heads))

    def compute_gates(self) -> Tensor:
        """Return the gates (L, H), detached; 1 where there are none."""
        layers = [b.attn for b in self.blocks]
        return torch.stack([a.gate() if a.gate is not None else torch.ones(a.num_heads) for a in layers]).detach()

    def merge(self) -> dict[str, Tensor]:
        """Return a state dict with open_clip's names below `visual.`, adapters and gates folded into the weights."""
        state = {k: v.clone() for k, v in self.state_dict().items() if ".adapters." not in k and ".gate." not in k}
        for i, block in enumerate(self.blocks):
            state |= {f"transformer.resblocks.{i}.attn.{k}": v for k, v in block.attn.merge().items()}
        return {f"visual.{k}": v for k, v in state.items()}
