"""Attention with an adapter (HA-LoRA) and a gate for every head.

Source: Wang & Kang, "Attention Head Purification", arXiv 2412.07226. Names follow PEFT: `lora_A` is the input side,
which the paper calls B, and `lora_B` the output side, zero at the start. Weights are written in the `x @ W` convention;
`nn.Linear` stores the transpose. *Adapter* means the LoRA matrices without the gates.

Shapes: B images, N tokens, D width, H heads of size Dh = D / H, r rank.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.registry import UsageError

GateKind = Literal["none", "softmax", "sigmoid", "hard"]


def check_targets(hparam: str, targets: str, least: int = 0) -> None:
    """Raise `UsageError` for a target that is none of the projections q, k, v, o."""
    if len(targets) < least or set(targets) - set("qkvo") or len(set(targets)) != len(targets):
        some = "some" if least else "any"
        raise UsageError(f"{hparam}: got {targets!r}, expected {some} of the letters q, k, v, o, each at most once")


class LowRank(nn.Module):
    """A low-rank change dW = `scale` A B of one projection, with `dropout` of its input."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

    def build_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (D, R) and B (R, D)."""
        raise NotImplementedError(f"{type(self).__name__}.build_factors")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + (x A) B, all (B, N, D). The other order, x (W + dW), would need the gradient of all of W."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        a, b = self.build_factors()
        return torch.addmm(y.flatten(0, 1), x.flatten(0, 1) @ a, b, alpha=self.scale).view(y.shape)

    def compute_delta_weight(self) -> Tensor:
        """Return dW (D, D)."""
        a, b = self.build_factors()
        return self.scale * (a @ b)


def draw_kaiming_uniform(width: int, *shape: int) -> Tensor:
    """Return a random tensor, Kaiming-uniform (a = sqrt 5) with fan-in `width`."""
    return torch.empty(*shape).uniform_(-(width**-0.5), width**-0.5)


def make_block_diagonal(blocks: Tensor) -> Tensor:
    """Return the block-diagonal matrix of H blocks, (H, a, b) -> (H a, H b)."""
    diagonal = torch.eye(len(blocks), dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    return (blocks[:, :, None] * diagonal).flatten(2).flatten(0, 1)  # (H, a, H, b)


class HeadLoRA(LowRank):
    """HA-LoRA of W_q, W_k or W_v: the columns of head i get dW_i = A_i B_i.

    It is computed as a LoRA of rank R = H r with a block-diagonal B, faster than H small products. `shared` is
    conventional LoRA: one A for all heads, R = r. Parameters: H r (D + Dh); shared 2 D r.
    """

    def __init__(
        self, width: int, num_heads: int, rank: int, shared: bool = False, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        lora_A = draw_kaiming_uniform(width, 1 if shared else num_heads, width, rank)
        super().__init__(lora_A, torch.zeros(num_heads, rank, width // num_heads), scale, dropout)

    def build_factors(self) -> tuple[Tensor, Tensor]:
        a = self.lora_A.transpose(0, 1).flatten(1)
        if len(self.lora_A) == 1:
            return a, self.lora_B.transpose(0, 1).flatten(1)
        return a, make_block_diagonal(self.lora_B)


class OutputHeadLoRA(LowRank):
    """HA-LoRA of W_o: the Dh rows that head i feeds get A_i B_i, so that A is the block-diagonal factor.

    `shared` is conventional LoRA: one B for all heads. It has as many parameters as `HeadLoRA`.
    """

    def __init__(
        self, width: int, num_heads: int, rank: int, shared: bool = False, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        lora_A = draw_kaiming_uniform(width, num_heads, width // num_heads, rank)
        super().__init__(lora_A, torch.zeros(1 if shared else num_heads, rank, width), scale, dropout)

    def build_factors(self) -> tuple[Tensor, Tensor]:
        b = self.lora_B.flatten(0, 1)
        if len(self.lora_B) == 1:
            return self.lora_A.flatten(0, 1), b
        return make_block_diagonal(self.lora_A), b


class HeadGate(nn.Module):
    """Gates of the heads of one layer, from `gate_logits` (H,) that start at zero.

    softmax: H * softmax(logits). The gates of a layer start at 1, and cannot switch a whole layer off.
    sigmoid: 2 * sigmoid(logits), independent of each other.
    hard: 1 for the `open_heads` best heads, else 0; straight-through Gumbel-softmax in training, top-k in evaluation.
    """

    def __init__(self, num_heads: int, kind: GateKind, open_heads: int) -> None:
        super().__init__()
        self.kind, self.open_heads = kind, open_heads
        self.gate_logits = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("shuffle", torch.arange(num_heads), persistent=False)
        self.shuffle: Tensor

    def forward(self) -> Tensor:
        """Return the gates (H,), in fp32 or better; in evaluation permuted by `shuffle`, by default the identity."""
        logits = self.gate_logits.to(torch.promote_types(self.gate_logits.dtype, torch.float32))
        if self.kind == "softmax":
            gates = len(logits) * logits.softmax(0)
        elif self.kind == "sigmoid":
            gates = 2 * logits.sigmoid()
        else:
            if self.training:
                logits = logits - torch.empty_like(logits).exponential_().log()  # Gumbel noise
            chosen = torch.zeros_like(logits).index_fill(0, logits.topk(self.open_heads).indices, 1.0)
            soft = self.open_heads * logits.softmax(0)
            gates = chosen + (soft - soft.detach())  # straight-through
        return gates if self.training else gates[self.shuffle]


class GatedProjection(torch.autograd.Function):
    """y = (gates * heads) W_o^T + b, with the gates multiplied into W_o: D D products in place of B N D.

    heads (B, N, H, Dh), gates (H,), weight (D, D) as nn.Linear stores it -> (B, N, D). Autograd alone would compute the
    gradient of all of W_o to get that of H gates.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(heads, gates, weight)
        gated = gate_weight(weight, gates).to(heads.dtype)
        return F.linear(heads.flatten(-2), gated, bias.to(heads.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, gates, weight = ctx.saved_tensors
        for_heads, for_gates, for_weight, for_bias = ctx.needs_input_grad
        d_heads = d_gates = d_weight = d_bias = None
        if for_heads or for_gates:
            d_heads = (grad @ weight.to(grad.dtype)).view(heads.shape)
        if for_gates:
            # Over tokens first: twice as fast on a CPU as over all at once.
            d_gates = (d_heads * heads).flatten(0, 1).sum(0, dtype=gates.dtype).sum(-1)
        if for_heads:
            d_heads *= gates[:, None].to(grad.dtype)
        if for_weight:
            gated = (heads * gates[:, None]).to(grad.dtype)
            d_weight = (grad.flatten(0, 1).T @ gated.flatten(2).flatten(0, 1)).to(weight.dtype)
        if for_bias:
            d_bias = grad.sum((0, 1))
        return d_heads, d_gates, d_weight, d_bias


def gate_weight(weight: Tensor, gates: Tensor) -> Tensor:
    """Return W_o (D, D), as nn.Linear stores it, with the columns that read head i multiplied by gate i."""
    gated: Tensor = weight.unflatten(1, (len(gates), -1)) * gates[:, None]
    return gated.flatten(1)


class HeadAttention(nn.Module):
    """Multi-head self-attention with the weights of `nn.MultiheadAttention` or open_clip's `Attention`, by their names.

    Without adapters and gates the result is the same. `causal`: a token sees no later one.
    """

    def __init__(self, pretrained: Any, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads = int(pretrained.num_heads)
        self.in_proj_weight: Tensor = pretrained.in_proj_weight  # (3 D, D)
        self.in_proj_bias = pretrained.in_proj_bias
        self.out_proj = pretrained.out_proj
        self.width = int(self.in_proj_weight.shape[1])
        self.adapters = nn.ModuleDict()
        self.gate: HeadGate | None = None

    def add_adapters(self, targets: str, rank: int, shared: bool, scale: float = 1.0, dropout: float = 0.0) -> None:
        """Add adapters to the projections in `targets`, any of the letters q, k, v, o. Rank 0 adds none."""
        for target in targets if rank else "":
            kind = OutputHeadLoRA if target == "o" else HeadLoRA
            self.adapters[target] = kind(self.width, self.num_heads, rank, shared, scale=scale, dropout=dropout)

    def add_gate(self, kind: GateKind, open_heads: int) -> None:
        self.gate = None if kind == "none" else HeadGate(self.num_heads, kind, open_heads)

    def compute_heads(self, x: Tensor, first: int | None = None) -> Tensor:
        """Return the heads' outputs before gating, (B, N, D) -> (B, N, H, Dh), of the `first` tokens or of all."""
        if first is None:
            q, k, v = self.project_inputs("qkv", x)
        else:
            (q,), (k, v) = self.project_inputs("q", x[:, :first]), self.project_inputs("kv", x)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, N, Dh)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

    def project_inputs(self, names: str, x: Tensor) -> list[Tensor]:
        """Return the projections of x (B, N, D) called `names`, neighbours among q, k, v, computed in one product."""
        merge = not self.training and not torch.is_grad_enabled()  # where nothing trains, one product is enough
        start = self.width * "qkv".index(names)
        rows = slice(start, start + self.width * len(names))
        weight = self.merge_in_proj() if merge else self.in_proj_weight
        parts = F.linear(x, weight[rows], self.in_proj_bias[rows]).chunk(len(names), dim=-1)
        pairs = zip(names, parts, strict=True)
        return [y if merge or name not in self.adapters else self.adapters[name](x, y) for name, y in pairs]

    def project_heads(self, heads: Tensor) -> Tensor:
        """Return the output projection of the gated heads, (B, N, H, Dh) -> (B, N, D). The bias is not gated."""
        if self.gate is None:
            y: Tensor = self.out_proj(heads.flatten(-2))
        else:
            gates = self.gate()
            y = GatedProjection.apply(heads, gates, self.out_proj.weight, self.out_proj.bias)
            heads = heads * gates[:, None].to(heads.dtype) if "o" in self.adapters else heads
        return self.adapters["o"](heads.flatten(-2), y) if "o" in self.adapters else y

    def forward(self, x: Tensor) -> Tensor:
        return self.project_heads(self.compute_heads(x))

    def merge_in_proj(self) -> Tensor:
        """Return W_q, W_k and W_v with their adapters added, (3 D, D) as nn.Linear stores them."""
        if not set("qkv") & set(self.adapters):
            return self.in_proj_weight
        merged = self.in_proj_weight.clone()
        for name, rows in zip("qkv", merged.chunk(3), strict=True):
            if name in self.adapters:
                rows += cast(LowRank, self.adapters[name]).compute_delta_weight().T
        return merged

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Return weights that compute the same: W + dW, and W_o with gate i in the rows that read head i."""
        out_proj = self.out_proj.weight.clone()  # stored transposed: the rows of W_o are columns here
        if "o" in self.adapters:
            out_proj += cast(LowRank, self.adapters["o"]).compute_delta_weight().T
        if self.gate is not None:
            out_proj = gate_weight(out_proj, self.gate()).to(out_proj.dtype)
        return {
            "in_proj_weight": self.merge_in_proj().clone(),
            "in_proj_bias": self.in_proj_bias.clone(),
            "out_proj.weight": out_proj,
            "out_proj.bias": self.out_proj.bias.clone(),
        }
