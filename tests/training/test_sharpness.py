import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import batches, make
from safetensors.torch import load_file
from short_runs import go, stop_at, terminate, without_times
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.training.sharpness import make_perturbation


class Linear(Algorithm):
    """Logits W x, trained by SGD without momentum on the joined cross-entropy; `stop` skips the step."""

    def __init__(self, stop: bool = False) -> None:
        super().__init__((5,), 3, 3, {})
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 5, generator=g, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(5, affine=False, dtype=torch.float64)  # looks on
        self.stop = stop
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5)

    def predict(self, x: Tensor) -> Tensor:
        if self.training:
            self.norm(x)
        return x @ self.weight.T

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        loss = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if not self.stop:
            self.optimizer.step()
        return {"loss": loss.item()}


def domains() -> list[Minibatch]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, generator=g).double() + i, torch.randint(3, (4,), generator=g)) for i in range(3)]


def gradients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (D,) and their gradients (D, 3, 5) by hand: (softmax - one-hot) x."""
    losses, results = [], []
    for x, y in domains():
        p = (x @ weight.T).softmax(dim=1)
        losses.append(-p[torch.arange(len(y)), y].log().mean())
        results.append((p - F.one_hot(y, 3)).T @ x / len(y))
    return torch.stack(losses), torch.stack(results)


@pytest.mark.parametrize(("sharpness", "variance_weight"), [("sam", 0.0), ("disam", 0.3)])
def test_a_step_has_the_gradient_of_the_climbed_point_and_starts_below_it(
    sharpness: str, variance_weight: float
) -> None:
    """d/dw Var(L) = 2/D sum (L_i - mean L) grad L_i."""
    algorithm = Linear()
    before = algorithm.weight.detach().clone()
    losses, grads = gradients(before)
    variance = 2 / 3 * ((losses - losses.mean())[:, None, None] * grads).sum(0)
    g = grads.mean(0) - variance_weight * variance
    assert g.norm() > 0.1 and variance.norm() > 0.1
    climbed = before + 0.4 * g / g.norm()
    with make_perturbation(algorithm, {"sharpness": sharpness, "sam_rho": 0.4, "disam_weight": 0.3})(domains()):
        torch.testing.assert_close(algorithm.weight.detach(), climbed)
        assert algorithm.norm.num_batches_tracked == 0  # buffers are back before the update
        algorithm.update(domains())
    torch.testing.assert_close(algorithm.weight.detach(), before - 0.5 * gradients(climbed)[1].mean(0))
    assert algorithm.unused.equal(torch.ones(2))


def sam(algorithm: Algorithm, **hparams: Any) -> Any:
    return make_perturbation(algorithm, {"sharpness": "sam", "sam_rho": 0.4, "disam_weight": 0.1} | hparams)


def test_an_update_without_a_step_ends_where_it_began_also_when_it_fails() -> None:
    algorithm = Linear(stop=True)
    before = algorithm.weight.detach().clone()
    with sam(algorithm)(domains()):
        algorithm.update(domains())
    assert torch.equal(algorithm.weight, before)
    with pytest.raises(KeyError), sam(algorithm)(domains()):
        raise KeyError
    assert torch.equal(algorithm.weight, before)


def test_an_optimizer_made_in_the_update_starts_below_too_and_none_is_left_with_a_hook() -> None:
    algorithm = Linear()
    before = algorithm.weight.detach().clone()
    with sam(algorithm)(domains()):
        algorithm.optimizer = torch.optim.SGD([algorithm.weight], lr=0.0)
        algorithm.update(domains())
        assert torch.equal(algorithm.weight, before)
    assert not _global_optimizer_pre_hooks


def test_a_second_step_of_an_update_is_not_undone() -> None:
    algorithm = Linear()
    with sam(algorithm)(domains()):
        algorithm.update(domains())
        first = algorithm.weight.detach().clone()
        algorithm.update(domains())
    assert (algorithm.weight - first).norm() > 0.01


def test_none_does_nothing() -> None:
    algorithm = Linear()
    before = algorithm.weight.detach().clone()
    with sam(algorithm, sharpness="none")(domains()):
        assert torch.equal(algorithm.weight, before)


@pytest.mark.parametrize("name", ["HeadPurification", "ERM", "FrozenCLIP"])
def test_without_a_climb_it_is_the_plain_update_and_with_one_it_is_not(name: str) -> None:
    """rho = 0 changes not a bit: the climb restores weights and buffers."""
    results = []
    for rho in (None, 0.0, 0.5):
        algorithm = make(name)
        climb = sam(algorithm, sam_rho=rho) if rho is not None else sam(algorithm, sharpness="none")
        for step in range(2):
            torch.manual_seed(step)
            with climb(batches(seed=step)):
                torch.manual_seed(step)
                algorithm.update(batches(seed=step))
        results.append([p.detach() for p in algorithm.parameters() if p.requires_grad])
    plain, still, climbed = results
    assert all(torch.equal(a, b) for a, b in zip(plain, still, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, climbed, strict=True))
    assert all(p.isfinite().all() for p in climbed)


@pytest.mark.parametrize(
    ("name", "prompt"), [("FineTuneCLIP", "promptstyler"), ("FineTuneCLIP", "duprg"), ("HeadPurification", "duprg")]
)
def test_a_classifier_that_is_fitted_in_the_climb_stays(name: str, prompt: str) -> None:
    small = {"styler_styles": 2, "styler_steps": 2, "styler_epochs": 2} if prompt == "promptstyler" else {}
    algorithm = make(name, prompt=prompt, **(small or {"duprg_epochs": 2}))
    with sam(algorithm)(batches()):
        assert algorithm.text.fitted
        features = algorithm.text.features.clone()
        algorithm.update(batches())
    assert torch.equal(algorithm.text.features, features)


def test_a_text_side_that_trains_by_its_own_loss_has_nothing_to_climb() -> None:
    algorithm = make("FrozenCLIP", prompt="duprg", duprg_per_step=True)
    with sam(algorithm)(batches()):
        algorithm.update(batches())


def test_what_rests_is_not_climbed() -> None:
    algorithm = make("LPFT", steps=4)
    tower = [p.detach().clone() for p in algorithm.tower.parameters()]
    with sam(algorithm)(batches()):
        assert all(torch.equal(a, b) for a, b in zip(tower, algorithm.tower.parameters(), strict=True))
        algorithm.update(batches())


def test_the_step_under_bf16_is_from_the_climbed_weights(tmp_path: Path) -> None:
    """A cast that autocast keeps of a weight would still be that of the start."""
    own = {"backbone": "small", "batch_size": 4, "sharpness": "sam", "sam_rho": 3.0}
    settings = {"algorithm": "ERM", "hparams": json.dumps(own), "steps": 1, "eval_images": 1}
    full, half = (go(tmp_path / p, precision=p, **settings)[0]["loss"] for p in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=0.05)


def test_a_method_that_does_not_train_has_nothing_to_climb() -> None:
    algorithm = make("ZeroShotCLIP")
    with sam(algorithm)(batches()):
        algorithm.update(batches())


@pytest.mark.parametrize("algorithm", ["HeadPurification", "ERM"])
def test_a_run_under_disam_goes_on_bit_for_bit(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"backbone": "small"} if algorithm == "ERM" else {"clip_model": "mini", "clip_pretrained": "shapes"}
    hparams = json.dumps(own | {"batch_size": 4, "sharpness": "disam", "average": "sma", "average_start": 1})
    settings = {"algorithm": algorithm, "hparams": hparams, "steps": 3}
    whole = go(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(1, patch, terminate, algorithm)
        with pytest.raises(SystemExit):
            go(tmp_path / "run", **settings)
    assert without_times(go(tmp_path / "run", **settings)) == without_times(whole)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)
