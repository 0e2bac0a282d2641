import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from helpers import images, make

from domainbed_hp.algorithms import get_algorithm_class
from domainbed_hp.datasets.open import find_spec
from domainbed_hp.plugins import import_plugin
from domainbed_hp.registry import ALGORITHMS, DATASETS, PROMPTS, SHARPNESS, WEIGHT_AVERAGES, UsageError
from domainbed_hp.training.sharpness import make_perturbation
from domainbed_hp.training.weight_averaging import make_weight_average

METHOD = """
from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.lora import LoRA
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.prompts.fixed import Template

MY_DATA = DatasetSpec("MyData", ("a", "b"), 2, folder="mine", domain_folders=("a", "b"))

class Mine(LoRA):
    pass

class Shout(Template):
    def compute_features(self, clip):
        return clip.encode_prompts([name.upper() for name in self.class_names])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "someones_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield "someones_method"
    ALGORITHMS.pop("Mine", None)
    PROMPTS.pop("Shout", None)
    DATASETS.pop("MyData", None)
    sys.modules.pop("someones_method", None)


def test_import_registers_what_the_module_defines(module: str) -> None:
    assert import_plugin(module) == ["Mine", "Shout", "MyData"]  # not the LoRA and the Algorithm that it imports
    assert find_spec("MyData").environments == ("a", "b")
    assert get_algorithm_class("Mine").__module__ == module
    logits = [make("Mine", prompt=prompt).predict(images(2)) for prompt in ("template", "Shout")]
    assert not torch.allclose(*logits)


def test_entry_points_are_registered_too(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("Mine", f"{module}:Mine", "domainbed_hp.algorithms"),
        EntryPoint("MyData", f"{module}:MY_DATA", "domainbed_hp.datasets"),
    ]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [point for point in points if group == point.group]
    )
    assert get_algorithm_class("Mine").__name__ == "Mine"
    assert find_spec("MyData").name == "MyData"


AROUND_UPDATES = """
from domainbed_hp.training.sharpness import SAM
from domainbed_hp.training.weight_averaging import WeightAverage

class Last(WeightAverage):
    def compute_weights(self):
        return self.parameters

class Lazy(SAM):
    pass
"""


def test_weight_averages_and_sharpness_methods_are_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "around_updates.py").write_text(AROUND_UPDATES)
    monkeypatch.syspath_prepend(tmp_path)
    for table in (WEIGHT_AVERAGES, SHARPNESS):
        for name in ("Last", "Lazy"):
            monkeypatch.setitem(table, name, "")
            monkeypatch.delitem(table, name)  # removed again at the end, too
    assert import_plugin("around_updates") == ["Last", "Lazy"]
    parameters = [torch.nn.Parameter(torch.ones(2))]
    average = make_weight_average(parameters, {"average": "Last"}, 1)
    assert average is not None and average.compute_weights() == parameters
    perturb = make_perturbation(make("LoRA"), {"sharpness": "Lazy", "sam_rho": 1.0})
    assert type(perturb.__self__).__name__ == "Lazy"


def test_a_module_without_algorithms_is_refused() -> None:
    with pytest.raises(UsageError, match="defines nothing to register"):
        import_plugin("json")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UsageError, match="Did you mean 'LoRA'.*Known: ZeroShotCLIP, ERM"):
        get_algorithm_class("Lora")
