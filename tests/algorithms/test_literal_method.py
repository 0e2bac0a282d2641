"""The method written down once more, literally and slowly, and trained beside the fast one.

Head by head, pair by pair, every token of every layer, autograd's own gradients, torch's plain AdamW.
"""

import copy
import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import batches, make, randomize
from open_clip.transformer import QuickGELU as StockQuickGELU
from torch import Tensor

from domainbed_hp.algorithms.head_purification import HeadPurification
from domainbed_hp.networks.vit import QuickGELU


def attention(attn: Any, x: Tensor) -> list[Tensor]:
    """Each head's output (B, N, Dh), gates aside."""
    size, outputs = attn.width // attn.num_heads, []
    for i in range(attn.num_heads):
        q, k, v = (
            x @ weight[i * size : (i + 1) * size].T + bias[i * size : (i + 1) * size]
            for weight, bias in zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
        )
        q = q + x @ attn.adapters["q"].lora_A[i] @ attn.adapters["q"].lora_B[i]
        v = v + x @ attn.adapters["v"].lora_A[i] @ attn.adapters["v"].lora_B[i]
        outputs.append((q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v)
    return outputs


def output(attn: Any, heads: list[Tensor]) -> Tensor:
    """Heads, gated, through W_o."""
    gates = len(heads) * attn.gate.gate_logits.softmax(0)
    gated = torch.cat([gate * head for gate, head in zip(gates, heads, strict=True)], dim=-1)
    return gated @ attn.out_proj.weight.T + attn.out_proj.bias


def forward(tower: Any, x: Tensor, local: bool) -> tuple[Tensor, list[Tensor]]:
    """Image features (B, E), and each layer's class token (B, D) as the MMD sees it."""
    x = F.conv2d((x - tower.normalise.mean) / tower.normalise.std, tower.conv1.weight, stride=tower.conv1.stride)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x, tokens = tower.ln_pre(x), []
    for block in tower.blocks:
        heads = attention(block.attn, block.ln_1(x))
        alone = x.detach() + output(block.attn, [head.detach() for head in heads])
        x = x + output(block.attn, heads)
        tokens.append((alone if local else x)[:, 0])
        x = x + block.mlp(block.ln_2(x))
    return tower.ln_post(x[:, 0]) @ tower.proj, tokens


def discrepancy(z: Tensor, sizes: list[int]) -> Tensor:
    """Mean over the pairs of domains, of features (n, D)."""
    terms = []
    for x, y in combinations(z.split(sizes), 2):
        pooled = torch.cat([x, y])
        d2 = (pooled[:, None] - pooled[None]).square().sum(-1)
        s = d2.detach()[torch.triu(torch.ones_like(d2), 1).bool()].mean()
        k = sum(torch.exp(-d2 / (2.0**j * s)) for j in range(-2, 3))
        n = len(x)
        terms.append(k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean())
    return torch.stack(terms).mean()


class Plain:
    """Trains a copy of `algorithm` literally."""

    def __init__(self, algorithm: HeadPurification, steps: int) -> None:
        self.a, h = copy.deepcopy(algorithm), algorithm.hparams
        adapters = {"params": self.a.adapters, "lr": h["lr"], "weight_decay": h["weight_decay"]}
        gates = {"params": self.a.gates, "lr": h["lr"] * h["gate_lr_factor"], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([adapters, gates], foreach=False)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def update(self, minibatches: list[Any]) -> dict[str, float]:
        x, y = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])
        features, tokens = forward(self.a.tower, x, self.a.hparams["mmd_reach"] == "local")
        ce = F.cross_entropy(self.a.logit_scale * F.normalize(features) @ self.a.text.features.T, y)
        sizes = [len(x) for x, _ in minibatches]
        mmd = torch.stack([discrepancy(F.layer_norm(z, z.shape[-1:]), sizes) for z in tokens]).mean()
        trained = self.a.adapters + self.a.gates
        for parameter, gradient in zip(trained, torch.autograd.grad(ce, trained, retain_graph=True), strict=True):
            parameter.grad = gradient
        for gate, gradient in zip(self.a.gates, torch.autograd.grad(mmd, self.a.gates), strict=True):
            gate.grad = gate.grad + self.a.hparams["mmd_weight"] * gradient
        self.optimizer.step()
        self.schedule.step()
        return {"ce": ce.item(), "mmd": mmd.item()}


def both(updates: int, dtype: torch.dtype, n: int = 4, bf16: bool = False, **hparams: Any) -> list[Tensor]:
    """Losses (updates, 2) of the fast and of the plain way, on domains of n, 3 and n images."""
    algorithm = make("HeadPurification", steps=50, lr=1e-3, **hparams)
    randomize(algorithm)
    algorithm = algorithm.to(dtype)
    plain, logged = Plain(algorithm, 50), ([], [])
    for step in range(updates):
        minibatches = batches((n, 3, n), seed=step, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            logged[0].append([float(value) for value in algorithm.update(minibatches).values()])
        logged[1].append(list(plain.update(minibatches).values()))
    return [torch.tensor(losses, dtype=torch.float64) for losses in logged]


@pytest.mark.parametrize("reach", ["local", pytest.param("global", marks=pytest.mark.slow)])
def test_equals_the_literal_method(reach: str) -> None:
    fast, plain = both(2, torch.float64, mmd_reach=reach)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    assert plain[0, 1] != plain[1, 1]


@pytest.mark.slow
def test_fifty_steps() -> None:
    fast, plain = both(50, torch.float32, n=2)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_steps_in_bf16() -> None:
    fast, plain = both(20, torch.float32, n=2, bf16=True)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-2, atol=1e-3)
    # Rounding sets the two apart, by less than neighbouring batches are.
    assert (fast - plain).abs().mean() < 0.25 * (plain[1:] - plain[:-1]).abs().mean()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_quick_gelu(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weights = 3 * torch.randn(2, 500), torch.randn(2, 500)
    results = []
    for gelu, kind in ((StockQuickGELU(), torch.float64), (QuickGELU(), dtype)):
        leaf = x.to(kind).requires_grad_()
        y = gelu(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, weights.to(kind))
        results.append((y.detach().double(), gradient.double()))
    for own, stock in zip(results[1], results[0], strict=True):
        assert (own - stock).norm() < tolerance * stock.norm()
