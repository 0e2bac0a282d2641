"""Maximum mean discrepancy with Gaussian kernels: the only MMD of the package."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kernel = Literal["multi_gaussian", "domainbed", "median"]
KERNELS: tuple[str, ...] = get_args(Kernel)
RATES = {
    "multi_gaussian": [2.0**-j for j in range(-2, 3)],
    "median": [1.0],
    "domainbed": [10.0**j for j in range(-3, 4)],
}
"""Factors gamma of a kernel, which is the sum of exp(-gamma d2 / s)."""


class MMD(nn.Module):
    """Squared MMD between the domains of a batch, mean over all pairs of domains.

    k(a, b) is a sum of Gaussians exp(-gamma |a - b|^2 / s). multi_gaussian: gamma = 2^-2 .. 2^2, s the mean squared
    distance. median: gamma = 1, s the median squared distance. domainbed: the seven fixed gammas of DomainBed's
    AbstractMMD, s = 1.
    """

    def __init__(self, kernel: Kernel = "multi_gaussian") -> None:
        super().__init__()
        self.kernel: Kernel = kernel

    def forward(self, z: Tensor, sizes: Sequence[int], scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the MMD of features z (..., n, D), split into domains of `sizes`, and its bandwidths (..., P).

        MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), diagonals included (biased, at least 0), is c^T k c with
        the contrast c of a pair. Leading axes are layers. `scales` are bandwidths in place of the batch's own. With one
        domain the MMD is exactly 0.
        """
        if len(sizes) < 2:
            return z.new_zeros(()), z.new_zeros(0)
        with torch.autocast(z.device.type, enabled=False):
            d2 = compute_squared_distances(z)  # (..., n, n)
            c, distinct = make_pair_contrasts(tuple(sizes), z.detach())  # (P, n), (P, n, n)
            s = compute_bandwidths(d2, distinct, self.kernel) if scales is None else scales  # (..., P)
            u = d2[..., None, :, :] / s[..., None, None]  # (..., P, n, n)
            k = torch.stack([-rate * u for rate in RATES[self.kernel]]).exp().sum(0)
            return (k * (c[:, :, None] * c[:, None, :])).sum((-2, -1)).mean(), s


def compute_squared_distances(z: Tensor) -> Tensor:
    """Return |z_i - z_j|^2, (..., n, D) -> (..., n, n)."""
    z = z - z.mean(-2, keepdim=True)  # changes no distance, and cancels less
    norms = z.square().sum(-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * z @ z.transpose(-1, -2)).clamp_min(0)


@cache
@torch.inference_mode(False)  # cached tensors take part in training, even if evaluation asked first
def _make_pair_contrasts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = torch.tensor(list(combinations(range(len(sizes)), 2))).T
    means = torch.block_diag(*(torch.full((1, n), 1 / n, dtype=dtype) for n in sizes))
    contrasts = means[a] - means[b]
    pooled = contrasts != 0
    distinct = (pooled[:, :, None] & pooled[:, None, :]).triu(1)
    return contrasts.to(device), distinct.to(device, dtype)


@torch.compiler.assume_constant_result
def make_pair_contrasts(sizes: tuple[int, ...], z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the contrasts (P, n) of the P pairs of domains, and their distinct pairs of features (P, n, n), as z.

    The contrast of (a, b) is 1 / n_a at a's features, -1 / n_b at b's, else 0. Distinct pairs are 1, others 0.
    """
    return _make_pair_contrasts(sizes, z.dtype, z.device)


def compute_bandwidths(d2: Tensor, distinct: Tensor, kernel: Kernel) -> Tensor:
    """Return the scale s of the kernel for each pair of domains, detached: squared distances (..., n, n) -> (..., P).

    `distinct` (P, n, n) selects a pair's distances. multi_gaussian: their mean. median: their median. domainbed: 1.
    """
    d2 = d2.detach()
    if kernel == "domainbed":
        return d2.new_ones(*d2.shape[:-2], len(distinct))
    if kernel == "median":
        s = torch.where(distinct > 0, d2[..., None, :, :], torch.nan).flatten(-2).nanmedian(-1).values
    else:
        s = (d2.flatten(-2) @ distinct.flatten(1).T) / distinct.sum((1, 2))
    return s.clamp_min(torch.finfo(s.dtype).tiny)  # any scale will do if all features are equal
