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
@torch.inference_mode(False)  # kept for training, whoever asks first
def _pairs(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = torch.tensor(list(combinations(range(len(sizes)), 2))).T
    means = torch.block_diag(*(torch.full((1, n), 1 / n, dtype=dtype) for n in sizes))
    contrasts = means[a] - means[b]
    pooled = contrasts != 0
    distinct = (pooled[:, :, None] & pooled[:, None, :]).triu(1)
    return contrasts.to(device), distinct.to(device, dtype)


@torch.compiler.assume_constant_result
def pairs(sizes: tuple[int, ...], z: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the P pairs of domains (a, b), as z is typed and placed: contrasts (P, n), 1 / n_a for a's features,
    -1 / n_b for b's and 0 else; and (P, n, n), 1 for the distinct pairs of their pooled features and 0 else."""
    return _pairs(sizes, z.dtype, z.device)


def bandwidths(d2: Tensor, distinct: Tensor, kernel: Kernel) -> Tensor:
    """The scale s of the kernel for each pair of domains, from squared distances (..., n, n) -> (..., P), detached.

    `distinct` (P, n, n) says which distances count. multi_gaussian: their mean. median: their median. domainbed: 1.
    """
    d2 = d2.detach()
    if kernel == "domainbed":
        return d2.new_ones(*d2.shape[:-2], len(distinct))
    if kernel == "median":
        s = torch.where(distinct > 0, d2[..., None, :, :], torch.nan).flatten(-2).nanmedian(-1).values
    else:
        s = (d2.flatten(-2) @ distinct.flatten(1).T) / distinct.sum((1, 2))
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
    d2 = squared_distances(z)
    c, distinct = pairs(tuple(sizes), z.detach())
    s = bandwidths(d2, distinct, kernel) if scales is None else scales
    values = (gram(d2, s, kernel) * (c[:, :, None] * c[:, None, :])).sum((-2, -1))  # (..., P)
    return values.mean(), s
