import json
from dataclasses import replace

import numpy as np
import pytest

from domainbed_hp.algorithms import get_algorithm_class
from domainbed_hp.hparams_registry import (
    TRAINING_HPARAMS,
    DeclaredHparams,
    HParam,
    choice,
    default_hparams,
    random_hparams,
    resolve_hparams,
)
from domainbed_hp.registry import ALGORITHMS, UsageError, load

NAMES = ("lr", "weight_decay", "batch_size", "resnet_dropout")


def draw(dataset, hparams_seed, trial_seed):
    hparams = resolve_hparams("ERM", dataset, hparams_seed, trial_seed, {})
    return tuple(hparams[name] for name in NAMES)


@pytest.mark.parametrize("dataset", ["PACS", "VLCS", "OfficeHome", "TerraIncognita"])
def test_random_draws_are_domainbeds(dataset):
    assert draw(dataset, 1, 0) == (2.7028930742148706e-05, 4.4832883881609976e-04, 39, 0.5)
    assert draw(dataset, 2, 0) == (5.6841898471378446e-05, 5.100223533962902e-03, 25, 0.5)
    assert draw(dataset, 3, 0) == (6.801736841150391e-05, 1.046949588651311e-05, 34, 0.0)
    assert draw(dataset, 1, 1) == (2.2352558725944602e-05, 1.9967320578799288e-06, 8, 0.5)
    assert draw(dataset, 1, 2) == (5.9943608091645206e-05, 4.8345143761565696e-04, 8, 0.5)


def test_random_draws_on_domain_net_and_small_images():
    assert draw("DomainNet", 1, 0) == (2.7028930742148706e-05, 4.4832883881609976e-04, 28, 0.5)
    # DomainBed draws the same for all its small images; the vector is ColoredMNIST's.
    assert draw("Debug28", 1, 0)[:3] == (1.1906162909279594e-04, 0.0, 372)


def test_defaults_are_domainbeds():
    assert [default_hparams("ERM", "PACS")[name] for name in NAMES] == [5e-5, 0.0, 32, 0.0]
    assert [default_hparams("ERM", "DomainNet")[name] for name in NAMES] == [5e-5, 0.0, 32, 0.0]
    assert [default_hparams("ERM", "Debug28")[name] for name in NAMES] == [1e-3, 0.0, 64, 0.0]
    flags = ("data_augmentation", "freeze_bn", "class_balanced", "nonlinear_classifier")
    assert [default_hparams("ERM", "PACS")[name] for name in flags] == [True, False, False, False]


def test_domainbeds_own_runs_reproduce(shared_data):
    runs = sorted((shared_data / "domainbed_sweep" / "runs").glob("*/results.jsonl"))
    assert len(runs) == 40
    for run in runs:
        record = json.loads(run.read_text().splitlines()[0])
        args = record["args"]
        ours = resolve_hparams("ERM", args["dataset"], args["hparams_seed"], args["trial_seed"], {})
        shared = record["hparams"].keys() & ours.keys()
        assert shared == record["hparams"].keys() - {"resnet18"}
        assert {name: ours[name] for name in shared} == {name: record["hparams"][name] for name in shared}


def test_hparams_are_plain_python():
    for seed in range(5):
        assert json.loads(json.dumps(hparams := random_hparams("ERM", "PACS", seed))) == hparams
        assert {type(value) for value in hparams.values()} <= {int, float, bool, str}
    for value in (HParam(1, choice(1, 2)).draw("x", 0), HParam(0.0, lambda r: np.float64(r.uniform())).draw("x", 0)):
        assert type(value) in (int, float)


def test_overrides():
    assert resolve_hparams("ERM", "PACS", 1, 0, {"batch_size": 5})["batch_size"] == 5
    widened = resolve_hparams("ERM", "PACS", 0, 0, {"weight_decay": 1})["weight_decay"]
    assert widened == 1.0 and type(widened) is float


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batchsize": 8}, "Did you mean 'batch_size'"),
        ({"resnet18": True}, "unknown hparam of ERM 'resnet18'"),
        ({"lr": "1e-3"}, "hparam lr: got '1e-3' \\(str\\), expected float"),
        ({"batch_size": 8.0}, "expected int"),
        ({"batch_size": True}, "expected int"),
        ({"freeze_bn": 1}, "expected bool"),
        ({"batch_size": 0}, "at least 1"),
        ({"lr": -1.0}, "at least 0"),
        ({"lr": float("nan")}, "at least 0"),
        ({"backbone": "resnet101"}, "known: 'resnet18', 'resnet50', 'clip', 'small'"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        resolve_hparams("ERM", "PACS", 0, 0, overrides)


def test_unknown_algorithm():
    with pytest.raises(UsageError, match="Known: .*ERM"):
        default_hparams("ERN", "PACS")


@pytest.mark.parametrize(
    ("parent", "small", "large"), [("ERM", "ShapesDG", "DomainNet"), ("CLIPood", "PACS", "OfficeHome")]
)
def test_a_childs_hparam_wins_on_every_data_set(
    parent: str, small: str, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = get_algorithm_class(parent)
    child = type("Child", (base,), {"HPARAMS": base.HPARAMS | {"lr": HParam(0.5)}})
    monkeypatch.setitem(ALGORITHMS, "Child", "conftest:Child")
    monkeypatch.setattr(
        "domainbed_hp.hparams_registry.load",
        lambda table, kind, name: child if name == "Child" else load(table, kind, name),
    )
    for dataset in (small, large, "PACS", "Debug28"):
        assert default_hparams("Child", dataset)["lr"] == 0.5
        assert random_hparams("Child", dataset, 1)["lr"] == 0.5
        ours, theirs = (default_hparams(name, dataset) for name in ("Child", parent))
        assert {name for name in ours if ours[name] != theirs[name]} == {"lr"}


def test_defaults_of_one_data_set_are_data() -> None:
    hparam = HParam(1.0, choice(1.0), "help", at_least=0, by_dataset={"PACS": HParam(2.0, choice(2.0))})
    assert hparam.for_dataset("VLCS") is hparam
    own = hparam.for_dataset("PACS")
    assert (own.default, own.draw("x", 0), own.help, own.at_least) == (2.0, 2.0, "help", 0)


def test_a_choice_of_one_data_set_adds_its_hparams(monkeypatch):
    average = replace(TRAINING_HPARAMS["average"], by_dataset={"PACS": HParam("swad")})

    class Averaged(get_algorithm_class("ERM")):
        HPARAMS = get_algorithm_class("ERM").HPARAMS | {"average": average}

    monkeypatch.setitem(ALGORITHMS, "Averaged", Averaged)
    assert "swad_ratio" in resolve_hparams("Averaged", "PACS", 0, 0, {})
    assert "swad_ratio" not in resolve_hparams("Averaged", "VLCS", 0, 0, {})


def test_a_hparam_that_is_not_declared_is_named() -> None:
    hparams = DeclaredHparams("Mine", {"lr": 0.1})
    assert hparams["lr"] == 0.1 and "mldg_beta" not in hparams and hparams.get("mldg_beta") is None
    with pytest.raises(UsageError, match=r"Mine reads hparam 'mldg_beta'.*HPARAMS = .*'mldg_beta': HParam\(default\)"):
        hparams["mldg_beta"]


@pytest.mark.parametrize("name", ["hparams_for", "pixels", "gradients", "losses"])
def test_methods_that_are_no_longer_called_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"Mine defines {name}, which is no longer called. Define "):
        type("Mine", (get_algorithm_class("LoRA"),), {name: lambda self: None})
