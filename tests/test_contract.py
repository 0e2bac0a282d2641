"""What every registered algorithm promises, on the embedded CLIP."""

import math
from typing import Any

import pytest
import torch
from helpers import batches, images, make

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.registry import ALGORITHMS

EVERY = [*ALGORITHMS]
TRAINED = [name for name in EVERY if name != "ZeroShotCLIP"]


def snapshot(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in algorithm.state_dict().items()}


def trained(name: str, steps: int = 3, **kwargs: Any) -> Algorithm:
    algorithm = make(name, **kwargs)
    for step in range(steps):
        torch.manual_seed(step)
        algorithm.update(batches(seed=step))
    return algorithm


@pytest.mark.parametrize("name", EVERY)
def test_update_is_finite_and_predict_has_the_shape(name: str) -> None:
    algorithm = make(name)
    logged = algorithm.update(batches((4, 3, 5)))
    assert logged and all(isinstance(v, float) and math.isfinite(v) for v in logged.values())
    logits = algorithm.predict(images(5))
    assert logits.shape == (5, 3) and logits.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_state_round_trip(name: str) -> None:
    algorithm, other = trained(name), make(name, seed=9)
    x = images(4)
    other.load_state_dict(algorithm.state_dict())
    assert torch.equal(other.eval().predict(x), algorithm.eval().predict(x))
    third = make(name, seed=7)  # what training changed is enough
    third.load_state_dict(algorithm.trained_state(), strict=False)
    assert torch.equal(third.eval().predict(x), algorithm.eval().predict(x))


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_numbers(name: str) -> None:
    a, b = snapshot(trained(name)), snapshot(trained(name))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", EVERY)
def test_only_what_is_declared_moves_and_all_of_it(name: str) -> None:
    algorithm = make(name)
    declared = {n for n, p in algorithm.named_parameters() if p.requires_grad}
    before = snapshot(algorithm)
    for step in range(3):
        algorithm.update(batches(seed=step))
    after = snapshot(algorithm)
    moved = {n for n, _ in algorithm.named_parameters() if not torch.equal(before[n], after[n])}
    assert moved == declared
    assert bool(declared) == (name in TRAINED)


@pytest.mark.parametrize("name", EVERY)
def test_predictions_do_not_depend_on_the_batch(name: str) -> None:
    algorithm = trained(name).eval()
    scale = getattr(algorithm, "logit_scale", 1.0)
    x = images(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = algorithm.predict(x)
        alone = torch.cat([algorithm.predict(image[None]) for image in x])
        shuffled = torch.empty_like(together)
        shuffled[order] = algorithm.predict(x[order])
    top = together.topk(2).values
    clear = (top[:, 0] - top[:, 1]) / scale > 1e-5
    for other in (alone, shuffled):
        torch.testing.assert_close(other / scale, together / scale, atol=1e-5, rtol=0)
        assert torch.equal(other.argmax(1)[clear], together.argmax(1)[clear])


@pytest.mark.parametrize("name", [n for n in EVERY if n != "ERM"])
def test_starts_as_the_zero_shot_model(name: str) -> None:
    x = images(4)
    a, b = make(name), make("ZeroShotCLIP")
    torch.testing.assert_close(a.predict(x) / a.logit_scale, b.predict(x) / b.logit_scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_input_as_in_a_stock_domainbed_checkout(name: str) -> None:
    x = images(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean[:, None, None]) / std[:, None, None]
    plain, stock = make(name), make(name, input_norm="imagenet")
    torch.testing.assert_close(stock.eval().predict(normalised), plain.eval().predict(x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "ERM"])
def test_class_names_come_as_keyword_or_hparam(name: str) -> None:
    algorithm = make(name)
    hparams = dict(algorithm.hparams)
    names = hparams.pop("class_names")
    again = type(algorithm)((3, 64, 64), 3, 3, hparams, class_names=names)
    assert torch.equal(again.class_features, algorithm.class_features)
    with pytest.raises(ValueError, match="expected 3"):
        type(algorithm)((3, 64, 64), 3, 3, hparams)
