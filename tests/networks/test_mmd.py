import math
from typing import Any

import pytest
import torch

from domainbed_hp.networks.mmd import KERNELS, MMD, compute_bandwidths, compute_squared_distances, make_pair_contrasts


def plain_mmd(x: list[list[float]], y: list[list[float]], kernel: str) -> float:
    """The definition, pair by pair, in plain Python."""

    def d2(a: list[float], b: list[float]) -> float:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    pooled = x + y
    pairs = sorted(d2(a, b) for i, a in enumerate(pooled) for b in pooled[:i])
    s = {"multi_gaussian": sum(pairs) / len(pairs), "median": pairs[(len(pairs) - 1) // 2], "domainbed": 1.0}[kernel]

    def k(a: list[float], b: list[float]) -> float:
        if kernel == "multi_gaussian":
            return sum(math.exp(-d2(a, b) / (2**j * s)) for j in range(-2, 3))
        if kernel == "median":
            return math.exp(-d2(a, b) / s)
        return sum(math.exp(-(10.0**j) * d2(a, b)) for j in range(-3, 4))

    def mean(u: list[list[float]], v: list[list[float]]) -> float:
        return sum(k(a, b) for a in u for b in v) / (len(u) * len(v))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def between(
    domains: list[torch.Tensor], kernel: Any = "multi_gaussian", scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = MMD(kernel)(
        torch.cat(domains, dim=-2), [d.shape[-2] for d in domains], scales
    )
    return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_definition(kernel: str) -> None:
    torch.manual_seed(0)
    x, y, z = torch.randn(4, 3).double(), torch.randn(6, 3).double() + 1, torch.randn(5, 3).double()
    expected = [plain_mmd(a.tolist(), b.tolist(), kernel) for a, b in ((x, y), (x, z), (y, z))]
    assert between([x, y], kernel)[0].item() == pytest.approx(expected[0], abs=1e-12)
    assert between([x, y, z], kernel)[0].item() == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_by_hand() -> None:
    # x = 0, y = 1 on a line: one distinct pair, s = 1; 2 k(0) - 2 k(1) = 2 (5 - sum of exp(-2^j))
    x, y = torch.zeros(1, 1), torch.ones(1, 1)
    expected = 2 * (5 - sum(math.exp(-(2.0**j)) for j in range(-2, 3)))
    assert between([x, y])[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_are_batched(kernel: str) -> None:
    torch.manual_seed(0)
    domains = [torch.randn(3, n, 5) for n in (4, 6, 5)]
    expected = torch.stack([between([d[i] for d in domains], kernel)[0] for i in range(3)]).mean()
    torch.testing.assert_close(between(domains, kernel)[0], expected)


def test_same_sample_and_single_domain_are_exactly_zero() -> None:
    x = torch.randn(5, 4)
    assert between([x])[0].item() == 0
    assert between([x, x])[0].item() == pytest.approx(0, abs=1e-6)
    equal = between([torch.ones(3, 2), torch.ones(4, 2)])[0]  # no scale, no nan
    assert equal.item() == pytest.approx(0, abs=1e-6)


def test_bandwidth_is_detached_and_can_be_held() -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    _, s = between([x, y])
    assert not s.requires_grad
    held, _ = between([3 * x, 3 * y], scales=s)
    free, _ = between([3 * x, 3 * y])
    torch.testing.assert_close(free, between([x, y])[0])  # scale-free where the bandwidth follows
    assert (held - free).abs() > 1e-3


def test_distances_far_from_the_origin() -> None:
    x = torch.randn(6, 8) * 1e-2
    far = compute_squared_distances(x + 100)
    torch.testing.assert_close(
        far, torch.cdist((x + 100).double(), (x + 100).double()).square().float(), atol=1e-6, rtol=1e-2
    )
    assert compute_bandwidths(far, make_pair_contrasts((4, 2), far)[1], "median").shape == (1,)
