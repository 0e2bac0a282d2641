"""Maximum mean discrepancy with Gaussian kernels: the only MMD of the package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["multi_gaussian", "domainbed", "median"]
KERNELS: tuple[str, ...] = get_args(Kernel)
RATES = {
    "multi_gaussian": [2.0**-j for j in range(-2, 3)],
    "median": [1.0],
    "domainbed": [10.0**j for j in range(-3, 4)],
}


def squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|^2, (..., n, D) -> (..., n, n). Centred first, which changes no distance and cancels less."""
    z = z - z.mean(-2, keepdim=True)
    norms = z.square().sum(-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * z @ z.transpose(-1, -2)).clamp_min(0)


@cache
def contrasts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each of the P pairs of domains (a, b), 1 / n_a for a's features, -1 / n_b for b's and 0 else, (P, n)."""
    a, b = torch.tensor(list(combinations(range(len(sizes)), 2))).T
    means = torch.block_diag(*(torch.full((1, n), 1 / n, dtype=dtype) for n in sizes))
    return (means[a] - means[b]).to(device)


@cache
def distinct_pairs(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each pair of domains, 1 for the distinct pairs of their pooled features and 0 else, (P, n, n)."""
    pooled = contrasts(sizes, dtype, device) != 0
    return (pooled[:, :, None] & pooled[:, None, :]).triu(1).to(dtype)


def bandwidths(d2: Tensor, sizes: tuple[int, ...], kernel: Kernel) -> Tensor:
    """The scale s of the kernel for each pair of domains, from squared distances (..., n, n) -> (..., P), detached.

    multi_gaussian: mean over the distinct pairs of the two. median: median over them. domainbed: 1.
    """
    pairs, d2 = distinct_pairs(sizes, d2.dtype, d2.device), d2.detach()
    if kernel == "domainbed":
        return d2.new_ones(*d2.shape[:-2], len(pairs))
    if kernel == "median":
        s = torch.where(pairs > 0, d2[..., None, :, :], torch.nan).flatten(-2).nanmedian(-1).values
    else:
        s = (d2.flatten(-2) @ pairs.flatten(1).T) / pairs.sum((1, 2))
    return s.clamp_min(torch.finfo(s.dtype).tiny)  # all features equal: any scale will do


def gram(d2: Tensor, s: Tensor, kernel: Kernel) -> Tensor:
    """The kernel matrices of squared distances (..., n, n) at P scales s (..., P), (..., P, n, n).

    multi_gaussian: sum over j = -2..2 of exp(-d2 / (2^j s)). median: exp(-d2 / s).
    domainbed: sum over seven fixed gammas of exp(-gamma d2), as DomainBed's AbstractMMD.
    """
    u = d2[..., None, :, :] / s[..., None, None]
    return torch.stack([-rate * u for rate in RATES[kernel]]).exp().sum(0)


def mmd(
    z: Tensor, sizes: Sequence[int], kernel: Kernel = "multi_gaussian", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared MMD between each two of the domains whose `sizes` split the features z (..., n, D); mean over all.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), diagonals included: biased, at least 0. Leading axes (layers) and
    pairs are computed in one product, c^T k c with the pair's contrast c.
    Returns it and the bandwidths (..., P), to pass back as `scales`. With one domain it is exactly 0.
    """
    if len(sizes) < 2:
        return z.new_zeros(()), z.new_zeros(0)
    d2, c = squared_distances(z), contrasts(tuple(sizes), z.dtype, z.device)
    s = bandwidths(d2, tuple(sizes), kernel) if scales is None else scales
    values = (gram(d2, s, kernel) * (c[:, :, None] * c[:, None, :])).sum((-2, -1))  # (..., P)
    return values.mean(), s
