"""Attention whose heads are adapted one by one (HA-LoRA) and gated one by one.

Source: Wang & Kang, "Attention Head Purification", arXiv 2412.07226. Names follow PEFT: `lora_A` is the input side,
`lora_B` the output side, zero at the start. (The paper calls the input side B; conventional LoRA, it says, shares it.)
Weights are written in the `x @ W` convention; `nn.Linear` stores the transpose. Adapters are the LoRA matrices only.

Shapes: B images, N tokens, D width, H heads of size Dh = D / H, r rank.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.registry import UsageError

GateKind = Literal["none", "softmax", "sigmoid", "hard"]


def check_targets(hparam: str, targets: str, least: int = 0) -> None:
    """`UsageError` for a target that is none of the projections q, k, v, o."""
    if len(targets) < least or set(targets) - set("qkvo") or len(set(targets)) != len(targets):
        some = "some" if least else "any"
        raise UsageError(f"{hparam}: got {targets!r}, expected {some} of the letters q, k, v, o, each at most once")


class HeadLoRA(nn.Module):
    """Low-rank change of W_q, W_k or W_v, head by head: head i's columns get dW_i = A_i B_i.

    `shared` is conventional LoRA: one A for all heads, so what one head learns moves the others.
    `scale` multiplies dW, `dropout` drops the input of A. Parameters: H r (D + Dh); shared 2 D r.
    """

    def __init__(
        self, width: int, num_heads: int, rank: int, shared: bool = False, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, scale, dropout
        self.lora_A = nn.Parameter(torch.empty(1 if shared else num_heads, width, rank))
        self.lora_B = nn.Parameter(torch.zeros(num_heads, rank, width // num_heads))
        nn.init.uniform_(self.lora_A, -(width**-0.5), width**-0.5)  # Kaiming-uniform (a = sqrt 5), fan-in D per head

    def forward(self, x: Tensor) -> Tensor:
        """x dW, (B, N, D) -> (B, N, D), on activations: one product with all A, then one small product a head."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        z = (x @ self.lora_A.transpose(0, 1).flatten(1)).unflatten(-1, (len(self.lora_A), -1))  # (B, N, H or 1, r)
        lora_B = self.scale * self.lora_B
        if len(self.lora_A) == 1:
            return torch.matmul(z.squeeze(-2), lora_B.transpose(0, 1).flatten(1))
        return torch.einsum("bnhr,hrd->bnhd", z, lora_B).flatten(-2)

    def delta(self) -> Tensor:
        """dW, (D, D)."""
        return self.scale * (self.lora_A @ self.lora_B).transpose(0, 1).flatten(1)


class OutputHeadLoRA(nn.Module):
    """Low-rank change of W_o, head by head. The blocks lie on the input side: head i feeds Dh rows of W_o.

    `shared`: one B for all heads, which is conventional LoRA. Parameters as `HeadLoRA`.
    """

    def __init__(
        self, width: int, num_heads: int, rank: int, shared: bool = False, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(num_heads, width // num_heads, rank))
        self.lora_B = nn.Parameter(torch.zeros(1 if shared else num_heads, rank, width))
        nn.init.uniform_(self.lora_A, -(width**-0.5), width**-0.5)

    def forward(self, heads: Tensor) -> Tensor:
        """heads dW, (B, N, H, Dh) -> (B, N, D)."""
        if self.dropout:
            heads = F.dropout(heads, self.dropout, self.training)
        z = self.scale * torch.einsum("bnhd,hdr->bnhr", heads, self.lora_A)
        if len(self.lora_B) == 1:
            return z.sum(-2) @ self.lora_B[0]
        return z.flatten(-2) @ self.lora_B.flatten(0, 1)

    def delta(self) -> Tensor:
        """dW, (D, D)."""
        return self.scale * (self.lora_A @ self.lora_B).flatten(0, 1)


class HeadGate(nn.Module):
    """One gate a head, from `gate_logits` (H,) that start at zero.

    softmax: H * softmax(logits); the gates of a layer sum to H, start at 1, and cannot switch a whole layer off.
    sigmoid: 2 * sigmoid(logits), independent. hard: 1 for the `keep` best heads and 0 for the others, straight-through
    Gumbel-softmax in training and plain top-k in evaluation; it does not start as the identity.
    """

    def __init__(self, num_heads: int, kind: GateKind, keep: int) -> None:
        super().__init__()
        self.kind, self.keep = kind, keep
        self.gate_logits = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("shuffle", torch.arange(num_heads), persistent=False)
        self.shuffle: Tensor

    def forward(self) -> Tensor:
        """The gates (H,), in fp32 or better. In evaluation they pass `shuffle`, a control that is the identity."""
        logits = self.gate_logits.to(torch.promote_types(self.gate_logits.dtype, torch.float32))
        if self.kind == "softmax":
            gates = len(logits) * logits.softmax(0)
        elif self.kind == "sigmoid":
            gates = 2 * logits.sigmoid()
        else:
            if self.training:
                logits = logits - torch.empty_like(logits).exponential_().log()  # Gumbel noise
            chosen = torch.zeros_like(logits).index_fill(0, logits.topk(self.keep).indices, 1.0)
            soft = self.keep * logits.softmax(0)
            gates = chosen + (soft - soft.detach())  # straight-through
        return gates if self.training else gates[self.shuffle]


class HeadAttention(nn.Module):
    """Multi-head self-attention that takes over the weights of a pretrained one, under their own names.

    Accepts whatever has `in_proj_weight`, `in_proj_bias`, `out_proj` and `num_heads`: `nn.MultiheadAttention` and
    open_clip's own `Attention`. Without adapters and gates it computes the same. `causal`: a token sees none behind it.
    """

    def __init__(self, pretrained: Any, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads = int(pretrained.num_heads)
        self.in_proj_weight = pretrained.in_proj_weight  # (3 D, D)
        self.in_proj_bias = pretrained.in_proj_bias
        self.out_proj = pretrained.out_proj
        self.width = int(self.in_proj_weight.shape[1])
        self.adapters = nn.ModuleDict()
        self.gate: HeadGate | None = None

    def add_adapters(self, targets: str, rank: int, shared: bool, scale: float = 1.0, dropout: float = 0.0) -> None:
        """Adapt the projections named in `targets`, any of the letters q, k, v, o; rank 0 adds none."""
        for target in targets if rank else "":
            kind = OutputHeadLoRA if target == "o" else HeadLoRA
            self.adapters[target] = kind(self.width, self.num_heads, rank, shared, scale=scale, dropout=dropout)

    def add_gate(self, kind: GateKind, keep: int) -> None:
        """Gate the heads."""
        self.gate = None if kind == "none" else HeadGate(self.num_heads, kind, keep)

    def heads(self, x: Tensor) -> Tensor:
        """The heads' outputs before gating, (B, N, D) -> (B, N, H, Dh)."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (
            (y + self.adapters[name](x) if name in self.adapters else y).unflatten(-1, (self.num_heads, -1))
            for name, y in (("q", q), ("k", k), ("v", v))
        )  # (B, N, H, Dh)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, Dh)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

    def project(self, heads: Tensor) -> Tensor:
        """Gate the heads, then the output projection, (B, N, H, Dh) -> (B, N, D). Its bias is not gated."""
        if self.gate is not None:
            heads = heads * self.gate()[:, None].to(heads.dtype)
        y: Tensor = self.out_proj(heads.flatten(-2))
        return y + self.adapters["o"](heads) if "o" in self.adapters else y

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.heads(x))

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Plain weights that compute the same: dW goes into W, the gate of head i into the rows of W_o that read it."""
        in_proj = self.in_proj_weight.clone()
        out_proj = self.out_proj.weight.clone()  # stored transposed: the rows of W_o are columns here
        weights = dict(zip("qkvo", [*in_proj.chunk(3), out_proj], strict=True))
        for target, adapter in self.adapters.items():
            weights[target] += cast(HeadLoRA | OutputHeadLoRA, adapter).delta().T
        if self.gate is not None:
            out_proj *= self.gate().to(out_proj.dtype).repeat_interleave(self.width // self.num_heads)
        return {
            "in_proj_weight": in_proj,
            "in_proj_bias": self.in_proj_bias.clone(),
            "out_proj.weight": out_proj,
            "out_proj.bias": self.out_proj.bias.clone(),
        }
