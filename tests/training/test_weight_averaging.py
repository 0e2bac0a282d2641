import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from helpers import make
from safetensors.torch import load_file
from short_runs import crash, go, stop_at, terminate, without_times
from torch import Tensor, nn

from domainbed_hp import records
from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training import checkpoint, evaluation, loop
from domainbed_hp.training.model_io import load_model
from domainbed_hp.training.weight_averaging import WeightAverage, make_weight_average, swap_weights

LORA = {"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}


def hparams(average: str, **overrides: Any) -> dict[str, Any]:
    return resolve_hparams("LoRA", "PACS", 0, 0, LORA | {"average": average} | overrides)


def walk(steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Weights at the start and after each step: two tensors, one of them in half precision."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(3, 2, generator=g), torch.randn(4, generator=g).bfloat16()] for _ in range(steps + 1)]


def follow(
    average: str, path: list[list[Tensor]], losses: Sequence[float] = (), resumed: Path | None = None, **overrides: Any
) -> tuple[list[nn.Parameter], WeightAverage]:
    """An average that saw all the weights of a path, and a loss after each second step; `resumed` after every step."""

    def start() -> tuple[list[nn.Parameter], WeightAverage]:
        parameters = [nn.Parameter(t.clone()) for t in path[0]]
        running = make_weight_average(parameters, hparams(average, **overrides), len(path) - 1)
        assert running is not None
        return parameters, running

    parameters, running = start()
    for step, weights in enumerate(path[1:], start=1):
        put(parameters, weights)
        running.step()
        if losses and step % 2 == 0:
            running.add_validation_loss(losses[step // 2 - 1])
        if resumed:
            torch.save(running.state_dict(), resumed / "state.pt")
            parameters, running = start()
            put(parameters, weights)
            running.load_state_dict(torch.load(resumed / "state.pt", weights_only=True))
    return parameters, running


def put(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, weights, strict=True):
        parameter.data.copy_(value)


def mean(path: list[list[Tensor]], weights: Sequence[float] | None = None) -> list[Tensor]:
    """In fp64."""
    share = torch.tensor(weights or [1.0] * len(path), dtype=torch.float64)
    return [
        torch.einsum("t,t...->...", share / share.sum(), torch.stack(tensors).double())
        for tensors in zip(*path, strict=True)
    ]


def same(result: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_the_simple_moving_average() -> None:
    path = walk(9)
    for steps in (0, 3, 4):
        assert torch.equal(follow("sma", path[: steps + 1], average_start=4)[1].compute_weights()[0], path[steps][0])
    same(follow("sma", path, average_start=4)[1].compute_weights(), mean(path[4:]))


@pytest.mark.parametrize("b", [0.5, 2.0])
def test_the_beta_moving_average(b: float) -> None:
    path = walk(9)
    weights = [scipy.stats.beta.pdf((t + 0.5) / 10, b, b) for t in range(10)]
    same(follow("beta", path, average_beta=b)[1].compute_weights(), mean(path, weights))


def test_wise_interpolates_between_the_start_and_the_current_weights() -> None:
    path = walk(5)
    same(follow("wise", path, wise_alpha=0.3)[1].compute_weights(), mean([path[0], path[-1]], [0.7, 0.3]))


def test_averages_are_held_in_fp32_or_better() -> None:
    path = [[t.double() if t.dtype == torch.float32 else t for t in weights] for weights in walk(3)]
    for name in ("sma", "beta", "wise"):
        assert [t.dtype for t in follow(name, path)[1].compute_weights()] == [torch.float64, torch.float32]


def window(losses: list[float], converge: int, tolerance: int, ratio: float) -> tuple[int, int] | None:
    """First and last record of the valley, by Algorithm 1 of the paper; where a run ends in it, without its rise."""
    start, limit = None, math.nan
    for i in range(len(losses)):
        if start is None:
            latest = losses[max(0, i - converge + 1) : i + 1]
            if len(latest) == converge and latest[0] == min(latest):
                start, limit = i - converge + 1, (1 + ratio) / converge * sum(latest)
        elif min(losses[max(0, i - tolerance + 1) : i + 1]) > limit:
            return start, i - tolerance
    if start is None:
        return None
    return start, max(i for i in range(start, len(losses)) if losses[i] <= limit)


CURVES = {
    "valley, then a rise": [5, 4, 3, 2, 1, 1.1, 1.2, 1.0, 3, 1.3, 3, 3, 3, 3, 3, 3, 1, 1],
    "ends on the way up": [5, 1, 1.1, 1.2, 1.1, 3, 3, 3],
    "ends in the valley": [5, 1, 1.1, 1.2, 1.1, 3, 1],
    "starts at the first record, dies at once": [1, 5, 5, 5, 5, 5, 5, 5],
    "goes on falling after it": [4, 2, 2.5, 2.2, 1, 0.5, 0.1, 0.2],
    "ties": [1, 1, 1, 1],
    "never converges": [5, 4, 3, 2, 1],
    "too short": [5, 6],
    "noise": [float(x) for x in torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.3],
}


@pytest.mark.parametrize("losses", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize(("converge", "tolerance", "ratio"), [(3, 6, 0.3), (2, 2, 0.2), (1, 3, 0.0)])
def test_swad_averages_the_valley(losses: list[float], converge: int, tolerance: int, ratio: float) -> None:
    """At every record: the mean over all steps of the window, where records have 1, 2, 3, 1, ... steps."""
    lengths = [1 + i % 3 for i in range(len(losses))]
    ends = [sum(lengths[: i + 1]) for i in range(len(losses))]
    path = walk(ends[-1])
    settings = {"swad_converge": converge, "swad_tolerance": tolerance, "swad_ratio": ratio}
    parameters, swad = follow("swad", path[:1], **settings)
    for i, loss in enumerate(losses):
        for step in range(ends[i] - lengths[i] + 1, ends[i] + 1):
            put(parameters, path[step])
            swad.step()
        swad.add_validation_loss(loss)
        first, last = window(losses[: i + 1], converge, tolerance, ratio) or (i, i)
        same(swad.compute_weights(), mean(path[ends[first] - lengths[first] + 1 : ends[last] + 1]))


def test_the_windows_of_the_curves() -> None:
    """The windows of some curves, worked out by hand from the paper's rule."""
    windows = {name: window(losses, 3, 6, 0.3) for name, losses in CURVES.items()}
    assert windows["valley, then a rise"] == (4, 9)
    assert windows["ends on the way up"] == (1, 4)
    assert windows["ends in the valley"] == (1, 6)
    assert windows["starts at the first record, dies at once"] == (0, 0)  # the threshold is 11/3 * 1.3 = 4.8
    assert windows["never converges"] is None and windows["too short"] is None


def test_swad_needs_a_tolerance_as_long_as_its_start() -> None:
    with pytest.raises(UsageError, match="expected at least swad_converge, 3"):
        follow("swad", walk(1), swad_tolerance=2)


@pytest.mark.parametrize("steps", [3, 8, 14, 20])
@pytest.mark.parametrize("name", ["sma", "beta", "swad", "wise"])
def test_an_average_goes_on_from_a_checkpoint_bit_for_bit(name: str, steps: int, tmp_path: Path) -> None:
    losses = [4.0, 3.0, 1.0, 1.2, 1.1, 3.0, 3.0, 1.0, 3.0, 3.0] if name == "swad" else []
    settings = {"sma": {"average_start": 5}, "swad": {"swad_converge": 2, "swad_tolerance": 2}}.get(name, {})
    _, whole = follow(name, walk(20)[: steps + 1], losses, **settings)
    _, other = follow(name, walk(20)[: steps + 1], losses, tmp_path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.compute_weights(), other.compute_weights(), strict=True))


def test_holding_gives_back_the_weights_bit_for_bit() -> None:
    algorithm = make("FineTuneCLIP")
    parameters = [p for p in algorithm.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(KeyError), swap_weights(parameters, [p.double() / 3 for p in before]):
        assert all(torch.equal(p, b / 3) for p, b in zip(parameters, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


SHORT = {
    "eval_images": None,
    "algorithm": "LoRA",
    "steps": 4,
    "checkpoint_freq": 1,
    "save_model_every_checkpoint": True,
}
SWAD_NOW = {"average": "swad", "swad_converge": 1, "swad_tolerance": 1, "swad_ratio": 0.0, "lr": 0.01}


def run(folder: Path, overrides: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    return go(folder, hparams=json.dumps(LORA | {"lr": 0.01} | overrides), **SHORT | settings)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    run(folder, {})
    return folder


def weights_after(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"model_step{step}.safetensors")


SLOW = pytest.mark.slow


@pytest.mark.parametrize("average", [pytest.param("beta", marks=SLOW), "swad"])
def test_records_and_models_are_of_the_averaged_weights_and_training_is_not(
    average: str, raw: Path, tmp_path: Path
) -> None:
    result = run(tmp_path, SWAD_NOW if average == "swad" else {"average": "beta"})
    there = list(records.read_records(raw))
    assert [r["ce"] for r in result] == [r["ce"] for r in there]
    algorithm, spec = load_model(raw)
    path = [loop.build_algorithm(spec, 3).trained_state()] + [weights_after(raw, step) for step in range(4)]
    names = [name for name, p in algorithm.named_parameters() if p.requires_grad]
    plan = loop.set_up_run(RunArgs("", **{k: v for k, v in result[0]["args"].items() if k != "output_dir"}))
    loaders = loop.make_eval_loaders(plan.dataset.environments, plan.splits, 64)
    for record in result[::3]:
        step = record["step"]
        shares = [scipy.stats.beta.pdf((t + 0.5) / 5, 0.5, 0.5) if t <= step + 1 else 0.0 for t in range(5)]
        if average == "swad":
            assert [r["raw_val_loss"] for r in result] == [r["val_loss"] for r in there]
            first, last = window([r["val_loss"] for r in there[: step + 1]], 1, 1, 0.0) or (0, 0)
            shares = [float(first + 1 <= t <= last + 1) for t in range(5)]
        explicit = dict(zip(names, mean([[state[name] for name in names] for state in path], shares), strict=True))
        saved = weights_after(tmp_path, step)
        same([saved[name] for name in names], list(explicit.values()))
        algorithm.load_state_dict(saved, strict=False)
        with loop.evaluation_mode(algorithm):
            scores = {
                k: evaluation.score_split(algorithm, loader, plan.device, plan.preprocess)
                for k, loader in loaders.items()
            }
        algorithm.eval()
        assert {f"{name}_acc": score.accuracy for name, score in scores.items()}.items() <= record.items()
        assert record["val_loss"] == pytest.approx((scores["env1_out"].loss + scores["env2_out"].loss) / 2, rel=1e-5)


def test_no_average_and_no_validation_images_no_loss(tmp_path: Path) -> None:
    result = run(tmp_path / "none", {}, steps=1, holdout_fraction=0.0)
    assert "val_loss" not in result[0] and "raw_val_loss" not in result[0]
    with pytest.raises(UsageError, match="average=swad needs validation images"):
        run(tmp_path / "swad", SWAD_NOW, steps=1, holdout_fraction=0.0)


@pytest.mark.parametrize(("average", "how"), [pytest.param("beta", terminate, marks=SLOW), ("swad", crash)])
def test_a_run_with_an_average_goes_on_bit_for_bit(
    average: str, how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = SWAD_NOW if average == "swad" else {"average": average}
    whole = run(tmp_path / "whole", overrides, checkpoint_freq=2)
    with monkeypatch.context() as patch:
        stop_at(3, patch, how)
        with pytest.raises((SystemExit, RuntimeError)):
            run(tmp_path / "run", overrides, checkpoint_freq=2)
    assert checkpoint.load_checkpoint(tmp_path / "run")["average"]  # type: ignore[index]
    check_resumed(tmp_path, whole, run(tmp_path / "run", overrides, checkpoint_freq=2))


def check_resumed(folder: Path, whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    assert without_times(resumed) == without_times(whole)
    a, b = (load_file(folder / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("call", [10, pytest.param(13, marks=SLOW)])
def test_a_record_that_is_stopped_is_validated_once(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second record: a record validates on two splits, then scores six."""
    whole = run(tmp_path / "whole", SWAD_NOW, checkpoint_freq=2)
    score, calls = evaluation.score_split, [0]

    def stopping(*args: Any) -> evaluation.SplitScore:
        calls[0] += 1
        if calls[0] == call:
            terminate()
        return score(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_split", stopping)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", SWAD_NOW, checkpoint_freq=2)
    assert checkpoint.load_checkpoint(tmp_path / "run")["step"] == 2  # type: ignore[index]
    check_resumed(tmp_path, whole, run(tmp_path / "run", SWAD_NOW, checkpoint_freq=2))
