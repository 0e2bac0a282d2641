"""The contract suite says what is wrong: for every check, classes that break its promise and the message they get."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY
from torch import nn

from domainbed_hp import testing
from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.lora import LoRA
from domainbed_hp.datasets.debug import DEBUG28
from domainbed_hp.datasets.spec import ArrayImages, DatasetSpec
from domainbed_hp.hparams_registry import HParam, choice
from domainbed_hp.prompts.fixed import Template
from domainbed_hp.prompts.linear import FromText
from domainbed_hp.registry import ALGORITHMS, DATASETS, PROMPTS, UsageError
from domainbed_hp.testing import check_algorithm, check_dataset, check_text_side


class Linear(Algorithm):
    """A sound method."""

    HPARAMS = Algorithm.HPARAMS | {"lr": HParam(0.1, choice(0.1, 0.2))}

    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
        self.optimizer = torch.optim.SGD(self.parameters(), hparams["lr"], momentum=0.9)

    def loss(self, minibatches: Any) -> Any:
        return torch.stack([F.cross_entropy(self.network(x), y) for x, y in minibatches]).mean()

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        loss = self.loss(minibatches)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def predict(self, x: Any) -> Any:
        return self.network(x)


class NoHParam(Linear):
    HPARAMS = Linear.HPARAMS | {"momentum": 0.9}


class DrawsAnotherType(Linear):
    HPARAMS = Linear.HPARAMS | {"lr": HParam(0.1, lambda r: 1)}


class DefaultOutOfRange(Linear):
    HPARAMS = Linear.HPARAMS | {"lr": HParam(0.1, by_dataset={"PACS": HParam(-1.0)}, at_least=0)}


class NoBatchSize(Linear):
    HPARAMS = {"lr": HParam(0.1)}


class ThreeArguments(Linear):
    def __init__(self, input_shape: Any, num_classes: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, 3, hparams)


class NoSuper(Linear):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        nn.Module.__init__(self)


class IgnoresTheKeyword(Linear):
    def __init__(self, *args: Any, class_names: Any = None) -> None:
        super().__init__(*args)
        if class_names is None:
            nn.init.zeros_(self.network[2].weight)


class ReadsUndeclared(Linear):
    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        return super().update(minibatches) | {"penalty": self.hparams["irm_lambda"]}


class ReturnsNothing(Linear):
    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        super().update(minibatches)


class Returns(Linear):
    value: Any = None

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        loss = self.loss(minibatches)
        return super().update(minibatches) | {"extra": {"graph": loss, "two": torch.ones(2), "nan": np.nan}[self.value]}


class ReturnsGraph(Returns):
    value = "graph"


class ReturnsTwo(Returns):
    value = "two"


class ReturnsNaN(Returns):
    value = "nan"


class WritesOnImages(Linear):
    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        minibatches[0][0].mul_(2)
        return super().update(minibatches)


class Idle(Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(3))


class MovesFrozen(Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(3), requires_grad=False)

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        self.extra.add_(1)
        return super().update(minibatches)


class Nothing(Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.requires_grad_(False)

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        return {"loss": 0.0}


class PredictsClasses(Linear):
    def predict(self, x: Any) -> Any:
        return super().predict(x).argmax(1)


class AlwaysThreeClasses(Linear):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, 3, num_domains, hparams)


class PredictsNaN(Linear):
    def predict(self, x: Any) -> Any:
        return super().predict(x) / 0 * 0


class BatchStatistics(Linear):
    def predict(self, x: Any) -> Any:
        return super().predict(x - x.mean(0))


class OrderMatters(Linear):
    def predict(self, x: Any) -> Any:
        return super().predict(x) * (1 + (x[0].sum() > x[-1].sum()))


class RandomInEvaluation(Linear):
    def predict(self, x: Any) -> Any:
        return super().predict(F.dropout(x))


class OwnRandomness(Linear):
    def loss(self, minibatches: Any) -> Any:
        return super().loss(minibatches) * np.random.default_rng().random()


class PredictLearns(Linear):
    def predict(self, x: Any) -> Any:
        if not self.training:
            self.optimizer.param_groups[0]["lr"] *= 2
        return super().predict(x)


class Unregistered(Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shift = 0.0

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        self.shift += 1.0
        return super().update(minibatches)

    def predict(self, x: Any) -> Any:
        return super().predict(x) + self.shift * torch.arange(self.network[2].out_features)


class StaleCache(Linear):
    weight: Any = None

    def predict(self, x: Any) -> Any:
        if self.training:
            self.weight = None
            return super().predict(x)
        if self.weight is None:
            self.weight = self.network[2].weight.clone()
        return F.linear(self.network[:2](x), self.weight)

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        self.weight = None
        return super().update(minibatches)


class Counts(Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step = 0

    def update(self, minibatches: Any, unlabeled: Any = None) -> Any:
        self.step += 1
        return super().update(minibatches)


class HiddenMomentum(Linear):
    def training_state(self) -> Any:
        return {"weights": self.trained_state(), "states": {}}

    def load_training_state(self, state: Any) -> None:
        self.load_state_dict(state["weights"], strict=False)


class Unloadable(Linear):
    def training_state(self) -> Any:
        return super().training_state() | {"rng": np.random.default_rng()}


class NoProtocol(Linear):
    @classmethod
    def describe_protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        return {"weights": "mine"}


class DiagnosesTensors(Linear):
    def diagnose(self, minibatches: Any) -> Any:
        return {"norm": self.network[2].weight.norm()}


class DiagnosisLearns(Linear):
    def diagnose(self, minibatches: Any) -> Any:
        self.network[2].bias.data += 1
        return {}


class ForgetsWeight(LoRA):
    def backward(self, minibatches: Any, weight: float) -> Any:
        return super().backward(minibatches, 1.0)


class MergesTooLittle(LoRA):
    def encode(self, x: Any, *args: Any) -> Any:
        return super().encode(x, *args).roll(1, dims=-1)


class RefusesWithoutReason(LoRA):
    def merge(self) -> Any:
        raise UsageError("impossible")


ALGORITHM_FAULTS = [
    (NoHParam, r"check_hparams: HPARAMS\['momentum'\] is 0.9, expected HParam\("),
    (DrawsAnotherType, "check_hparams: lr: drew 1, expected the type of its default 0.1"),
    (DefaultOutOfRange, "check_hparams: hparam lr: got -1.0, expected at least 0. Correct the default"),
    (NoBatchSize, "check_hparams: HPARAMS has no batch_size"),
    (ThreeArguments, r"check_constructor: too many positional arguments. Take \(input_shape, num_classes, num_domains"),
    (NoSuper, "check_constructor: it has no hparams. Call super"),
    (IgnoresTheKeyword, r"check_constructor: class_names=\[...\] and hparams\['class_names'\] give different"),
    (ReadsUndeclared, "check_update: ReadsUndeclared reads hparam 'irm_lambda' and does not declare it. Declare its"),
    (ReturnsNothing, "check_update: got None, expected numbers to log"),
    (ReturnsGraph, "check_update: extra is tensor.*which holds the step's graph in memory. Detach it"),
    (ReturnsTwo, "check_update: extra is tensor.*expected one number"),
    (ReturnsNaN, "check_update: extra is nan, expected a finite number"),
    (WritesOnImages, "check_update: it writes on the images"),
    (Idle, r"check_parameters: no update moves \['extra'\]. Give them to an optimizer"),
    (MovesFrozen, r"check_parameters: updates move \['extra'\], whose requires_grad is False"),
    (Nothing, "check_parameters: nothing trains.*Set STEPS = 1"),
    (PredictsClasses, r"check_predict: got shape \(1,\), expected \(images, num_classes\), \(1, 3\)"),
    (AlwaysThreeClasses, r"check_predict: got shape \(5, 3\), expected \(images, num_classes\), \(5, 2\)"),
    (PredictsNaN, "check_predict: got tensor.*expected finite logits"),
    (BatchStatistics, "check_predict_per_image: logits of single or reordered images are off by"),
    (OrderMatters, "check_predict_per_image: logits of single or reordered images are off by"),
    (RandomInEvaluation, "check_predict_per_image: .*no random numbers"),
    (OwnRandomness, "check_seeds: the same seeds, .* give another network.2.weight. Draw from the global generators"),
    (PredictLearns, "check_seeds: the same seeds, with predictions between updates, give another network.2.weight"),
    (Unregistered, r"check_state_dict: another instance with its state_dict\(\) gives other predictions. Register"),
    (StaleCache, "check_state_dict: .*compute what is cached anew"),
    (Counts, "check_resume: a resumed run has another attribute step. Return all that update changes"),
    (HiddenMomentum, "check_resume: a resumed run has another network.2.weight"),
    (Unloadable, "check_resume: .*Return tensors and plain values only"),
    (NoProtocol, "check_record_values: describe_protocol has no .*'source_free', 'template', 'transductive'"),
    (DiagnosesTensors, "check_record_values: diagnose: got .*expected plain finite values"),
    (DiagnosisLearns, "check_record_values: diagnose changes network.2.bias"),
    (ForgetsWeight, r"check_accumulate: backward\(minibatches, 0.5\) is not half of .* Use weight \* loss"),
    (MergesTooLittle, "check_merge: the plain CLIP's image features are off by"),
    (RefusesWithoutReason, "check_merge: got UsageError.*'impossible'.*Name it"),
]


def test_sound_methods_pass_and_every_check_has_a_fault() -> None:
    check_algorithm(Linear, lr=0.2)
    check_algorithm(LoRA, lora_rank=1)
    assert "Linear" not in ALGORITHMS
    checks = {check.__name__ for check in (*testing.ALGORITHM_CHECKS, testing.check_hparams)}
    assert {message.split(":")[0] for _, message in ALGORITHM_FAULTS} >= checks


@pytest.mark.parametrize(("broken", "message"), ALGORITHM_FAULTS)
def test_a_broken_method_is_caught(broken: type[Algorithm], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^{broken.__name__}, {message}"):
        check_algorithm(broken, **(TINY if issubclass(broken, LoRA) else {}))


def test_wrong_hparams_are_the_callers_fault() -> None:
    with pytest.raises(UsageError, match="unknown hparam of Linear 'lrr'. Did you mean 'lr'"):
        check_algorithm(Linear, lrr=1.0)
    with pytest.raises(UsageError, match="unknown algorithm 'Lora'. Did you mean 'LoRA'"):
        check_algorithm("Lora")


class TwiceAsLong(Template):
    def encode(self, images: Any, sizes: Any) -> Any:
        return 2 * self.features


class PerImageInSecret(Template):
    def encode(self, images: Any, sizes: Any) -> Any:
        return F.normalize(self.features + images.mean(0), dim=-1)


class PerClassInSecret(Template):
    PER_IMAGE = True


class NoOptimizer(FromText):
    def make_optimizer(self) -> Any:
        return None


class SaysItDoesNotTrain(FromText):
    TRAINS = False


class ChangesTheTower(Template):
    def attach(self, tower: Any) -> None:
        tower.proj.data += 1


TEXT_FAULTS = [
    (TwiceAsLong, "check_text_features: encode: got features of length tensor.*expected 1. Use prompts.base.unit"),
    (PerImageInSecret, "check_text_features: encode depends on the images and is cached"),
    (
        PerClassInSecret,
        r"check_text_features: encode: got shape \(3, 128\), expected \(4, 3, 128\) with PER_IMAGE = True",
    ),
    (NoOptimizer, r"check_text_optimizer: make_optimizer leaves out \['weight'\]"),
    (SaysItDoesNotTrain, "check_text_optimizer: TRAINS is False, but 1 parameters have an optimizer. Correct TRAINS"),
    (ChangesTheTower, "check_text_attach: attach changes image features: True. Set CHANGES_TOWER = True"),
]


@pytest.mark.parametrize(("broken", "message"), TEXT_FAULTS)
def test_a_broken_text_side_is_caught(broken: type[Template], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^{broken.__name__}, {message}"):
        check_text_side(broken)
    assert broken.__name__ not in PROMPTS


class Greeting(Template):
    HPARAMS = {"template": HParam("hello {}")}


def test_a_sound_text_side_passes() -> None:
    check_text_side(Greeting, template="good morning {}")


def made(change: Any = lambda images, labels: (images, labels), **facts: Any) -> DatasetSpec:
    """A data set of three environments, 4 images each, whose arrays pass `change`."""

    def build() -> Any:
        rng = np.random.default_rng(0)
        arrays = [rng.integers(0, 256, (4, 8, 8, 3), np.uint8) for _ in "abc"]
        return [ArrayImages(*change(images, np.array([0, 1, 0, 1]))) for images in arrays]

    return replace(DatasetSpec("Made", ("a", "b", "c"), 2, ("cat", "dog"), build=build, image_size=8), **facts)


FOLDER = DatasetSpec("Folder", ("a", "b"), 2, ("cat", "dog"), folder="pets", domain_folders=("a", "b"))
DATASET_FAULTS = [
    (made(environments=("a",)), r"check_facts: got environments \('a',\), expected at least 2"),
    (made(environments=("a", "b", "b")), "check_facts: got environments .*different ones"),
    (made(class_names=("cat",)), r"check_facts: got class_names \('cat',\), expected num_classes, 2, different ones"),
    (made(steps=0), "check_facts: got .*'steps': 0.*expected at least 1"),
    (made(image_counts=(4, 4)), "check_facts: got image_counts .*expected one number for each of"),
    (replace(FOLDER, folder=""), "check_facts: it has neither folder nor build"),
    (replace(FOLDER, domain_folders=("a",)), "check_facts: got domain_folders"),
    (replace(FOLDER, class_names=("dog", "cat")), "check_facts: got class_names .*Sort them"),
    (replace(FOLDER, folder="/nowhere"), "check_images: Folder: cannot read /nowhere"),
    (made(environments=("a", "b")), "check_images: got 3 environments, expected"),
    (made(image_counts=(4, 4, 5)), r"check_images: got \(4, 4, 4\) images, expected \[\(4, 4, 5\)\]"),
    (made(lambda x, y: (x, y + 1)), r"check_images: labels \[0, 2\] are missing or too large, expected all of 0 to 1"),
    (made(lambda x, y: (x, y), class_names=None, num_classes=3), r"check_images: labels \[2\] are missing"),
    (
        made(lambda x, y: (np.random.default_rng().permutation(x.ravel()).reshape(x.shape), y)),
        "check_images: a: .*fixed seed",
    ),
]


@pytest.mark.parametrize(("broken", "message"), DATASET_FAULTS)
def test_a_broken_data_set_is_caught(broken: DatasetSpec, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^{broken.name}, {message}"):
        check_dataset(broken)


def test_labels_that_are_not_int64_are_caught() -> None:
    class Int32Labels(ArrayImages):
        def __init__(self, array: Any, labels: Any) -> None:
            super().__init__(array, labels)
            self.labels = labels.astype(np.int32)

    images = [Int32Labels(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1])) for _ in "abc"]
    with pytest.raises(AssertionError, match="check_images: a: got labels .*int32, expected 2 of int64"):
        check_dataset(made(build=lambda: images))


@pytest.mark.parametrize("name", DATASETS)
def test_the_packages_own_data_sets_pass(name: str) -> None:
    check_dataset(name)


def test_sound_data_sets_pass(drawn: Any) -> None:
    check_dataset(made())
    check_dataset(DEBUG28)
    check_dataset("folder:mine", drawn)


def test_pacs_passes(shared_data: Any) -> None:
    check_dataset("PACS", shared_data)
