"""A step in parts: gradients of the whole."""

from typing import Any

import pytest
import torch
from helpers import batches, make, randomize
from torch import Tensor

from domainbed_hp.algorithms.clip_algorithm import split_minibatches
from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.registry import UsageError

SIZES = (5, 4, 3)


def after_update(minibatches: list[Any], name: str, **hparams: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients that an update leaves, by parameter, and what it logs."""
    algorithm = make(name, **hparams)
    randomize(algorithm)
    logged = algorithm.double().update(minibatches)
    return {n: p.grad for n, p in algorithm.named_parameters() if p.grad is not None}, logged


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("LoRA", {"prompt": "coop"}),
        ("CLIPood", {}),
        ("MIRO", {}),
        ("HeadPurification", {"prompt": "duprg", "duprg_per_step": True, "mmd_weight": 0.0}),
    ],
)
def test_the_gradients_of_the_parts_are_those_of_the_whole(name: str, hparams: dict[str, Any]) -> None:
    minibatches = batches(SIZES, dtype=torch.float64)
    (whole, logged), (added, again) = (after_update(minibatches, name, accumulate=count, **hparams) for count in (1, 3))
    assert whole and added.keys() == whole.keys() and any(g.abs().max() > 1e-3 for g in whole.values())
    for key, gradient in whole.items():
        torch.testing.assert_close(added[key], gradient, atol=1e-10, rtol=1e-10)
    for key in logged.keys() - {"mmd"}:
        torch.testing.assert_close(again[key], logged[key], atol=1e-10, rtol=1e-10)


def test_an_mmd_is_each_parts_own_and_routed_in_each() -> None:
    minibatches = batches(SIZES, dtype=torch.float64)
    whole, logged = after_update(minibatches, "HeadPurification", accumulate=2)
    expected, mmd = {key: torch.zeros_like(g) for key, g in whole.items()}, 0.0
    for part, share in split_minibatches(minibatches, 2):
        alone, metrics = after_update(part, "HeadPurification")
        mmd += share * metrics["mmd"]
        for key, gradient in alone.items():
            expected[key] += share * gradient
    torch.testing.assert_close(whole, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(logged["mmd"], mmd, atol=1e-10, rtol=1e-10)


def test_every_part_has_images_of_all() -> None:
    parts = [([len(x) for x, _ in part], share) for part, share in split_minibatches(batches(SIZES), 3)]
    assert parts == [([2, 2, 1], 5 / 12), ([2, 1, 1], 4 / 12), ([1, 1, 1], 3 / 12)]
    mini = {"clip_model": "mini", "clip_pretrained": "shapes"}
    with pytest.raises(UsageError, match="accumulate: got 5, expected at most batch_size, 4"):
        resolve_hparams("LoRA", "PACS", 0, 0, mini | {"accumulate": 5, "batch_size": 4})
