"""Maximum mean discrepancy with Gaussian kernels: the only MMD of the package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["multi_gaussian", "domainbed", "median"]
KERNELS: tuple[str, ...] = get_args(Kernel)


def squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|^2, (..., n, D) -> (..., n, n). Centred first, which changes no distance and cancels less."""
    z = z - z.mean(-2, keepdim=True)
    norms = z.square().sum(-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * z @ z.transpose(-1, -2)).clamp_min(0)


def bandwidth(d2: Tensor, kernel: Kernel) -> Tensor:
    """The scale s of the kernel from pooled squared distances (..., n, n) -> (...,), detached.

    multi_gaussian: mean over the distinct pairs. median: median over the distinct pairs. domainbed: 1.
    """
    n = d2.shape[-1]
    d2 = d2.detach()
    if kernel == "domainbed":
        return torch.ones_like(d2[..., 0, 0])
    i, j = torch.triu_indices(n, n, offset=1, device=d2.device)
    pairs = d2[..., i, j]
    s = pairs.mean(-1) if kernel == "multi_gaussian" else pairs.median(-1).values
    return s.clamp_min(torch.finfo(s.dtype).tiny)  # all features equal: any scale will do


def gram(d2: Tensor, s: Tensor, kernel: Kernel) -> Tensor:
    """The kernel matrix of squared distances (..., n, n) at scale s (...,).

    multi_gaussian: sum over j = -2..2 of exp(-d2 / (2^j s)). median: exp(-d2 / s).
    domainbed: sum over seven fixed gammas of exp(-gamma d2), as DomainBed's AbstractMMD.
    """
    rates = {
        "multi_gaussian": [2.0**-j for j in range(-2, 3)],
        "median": [1.0],
        "domainbed": [10.0**j for j in range(-3, 4)],
    }[kernel]
    u = d2 / s[..., None, None]
    return torch.stack([torch.exp(-rate * u) for rate in rates]).sum(0)


def pair_mmd(x: Tensor, y: Tensor, kernel: Kernel = "multi_gaussian", s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared MMD of x (..., n, D) and y (..., m, D), and the bandwidth it used, both (...,).

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), diagonals included: biased, at least 0.
    `s` holds the bandwidth fixed; otherwise it comes from the pooled x and y.
    """
    d2 = squared_distances(torch.cat([x, y], dim=-2))
    s = bandwidth(d2, kernel) if s is None else s
    k = gram(d2, s, kernel)
    n = x.shape[-2]
    xx, yy, xy = k[..., :n, :n], k[..., n:, n:], k[..., :n, n:]
    return xx.mean((-2, -1)) + yy.mean((-2, -1)) - 2 * xy.mean((-2, -1)), s


def mmd(
    domains: Sequence[Tensor], kernel: Kernel = "multi_gaussian", scales: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Squared MMD over pairs of domains, each (..., n_e, D); leading axes (layers) are computed in one product.

    Returns its mean over pairs and leading axes, and the bandwidths, one (...,) a pair, to pass back as `scales`.
    With one domain it is exactly 0.
    """
    pairs = list(combinations(domains, 2))
    if not pairs:
        return domains[0].new_zeros(()), []
    fixed: Sequence[Tensor | None] = scales or [None] * len(pairs)
    results = [pair_mmd(x, y, kernel, s) for (x, y), s in zip(pairs, fixed, strict=True)]
    return torch.stack([value for value, _ in results]).mean(), [s for _, s in results]
