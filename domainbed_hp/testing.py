"""Checks of the package's contracts, for a method, a text side or a data set of your own; pytest is not needed.

    from domainbed_hp.testing import check_algorithm

    def test_my_method():
        check_algorithm(MyMethod, lr=1e-3)

An AssertionError says what was got, what was expected and what to do. CLIP methods run on the embedded CLIP: nothing is
downloaded, and an algorithm takes about two seconds on a CPU.
"""

import inspect
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from domainbed_hp.algorithms.base import Algorithm, Minibatch
from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm
from domainbed_hp.datasets.open import find_spec, open_dataset
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.hparams_registry import DeclaredHparams, HParam, known_hparams, resolve_hparams
from domainbed_hp.networks.clip import export_clip, find_clip, load_clip
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.prompts.base import TextSide, unit
from domainbed_hp.registry import ALGORITHMS, PROMPTS, UsageError, load
from domainbed_hp.training.evaluation import evaluation_mode
from domainbed_hp.training.model_io import seed_everything

CLASS_NAMES = ["dog", "electric_guitar", "house"]
UPDATES = 2
"""Training steps of a checked algorithm."""


def check_algorithm(algorithm: type[Algorithm] | str, **hparams: Any) -> None:
    """Check all promises of an algorithm, a class or a registered name. `hparams` replace defaults.

    Raises:
        AssertionError: a promise is broken.
        UsageError: `hparams` have an unknown name or do not go together.
    """
    name = algorithm if isinstance(algorithm, str) else algorithm.__name__
    with mock.patch.dict(ALGORITHMS, {} if isinstance(algorithm, str) else {name: algorithm}):
        run_checks(name, [check_hparams], load(ALGORITHMS, "algorithm", name))
        run_checks(name, ALGORITHM_CHECKS, AlgorithmCase(name, hparams))


def check_text_side(text_side: type[TextSide] | str, **hparams: Any) -> None:
    """Check all promises of a text side, alone and on a frozen image tower; errors as `check_algorithm`."""
    name = text_side if isinstance(text_side, str) else text_side.__name__
    with mock.patch.dict(PROMPTS, {} if isinstance(text_side, str) else {name: text_side}):
        cls = load(PROMPTS, "prompt", name)
        run_checks(name, [check_hparams], cls)
        trains = cls.trains({key: hparam.default for key, hparam in cls.HPARAMS.items()} | hparams)
        case = AlgorithmCase("FrozenCLIP" if trains else "ZeroShotCLIP", {"prompt": name} | hparams)
        run_checks(name, (*TEXT_SIDE_CHECKS, *ALGORITHM_CHECKS), case)


def check_dataset(spec: DatasetSpec | str, data_dir: str | Path | None = None) -> None:
    """Check the facts of a data set and, if `data_dir` or the spec's `build` gives them, its images."""
    spec = find_spec(spec, data_dir) if isinstance(spec, str) else spec
    run_checks(spec.name, [check_facts], spec)
    if spec.build is not None or data_dir is not None or Path(spec.folder).is_absolute():
        run_checks(spec.name, [check_images], spec, Path(data_dir or "."))


def run_checks(name: str, checks: Iterable[Callable[..., None]], *subject: Any) -> None:
    """Run checks in order. A UsageError inside one is a broken promise too."""
    for check in checks:
        try:
            check(*subject)
        except (AssertionError, UsageError) as error:
            raise AssertionError(f"{name}, {check.__name__}: {error}") from error


class AlgorithmCase:
    """An algorithm with its hparams, to build and to train on random images of three domains."""

    def __init__(self, name: str, hparams: Mapping[str, Any]) -> None:
        self.name, self.cls = name, load(ALGORITHMS, "algorithm", name)
        known = known_hparams(name, "ShapesDG", hparams)
        mini = {k: v for k, v in (("clip_model", "mini"), ("clip_pretrained", "shapes")) if k in known}
        self.hparams = resolve_hparams(name, "ShapesDG", 0, 0, mini | dict(hparams))
        self.size = self.cls.preprocess(self.hparams, 64).size

    def build(self, seed: int = 0, names: Sequence[str] = CLASS_NAMES) -> Algorithm:
        """Return the untrained algorithm. Reading an hparam that it does not declare is a UsageError."""
        seed_everything(seed)
        hparams = DeclaredHparams(self.name, self.hparams | {"class_names": list(names), "steps": UPDATES})
        algorithm: Algorithm = self.cls((3, self.size, self.size), len(names), 3, hparams)
        return algorithm

    def make_images(self, count: int, seed: int = 1) -> Tensor:
        """Return random images (count, 3, S, S)."""
        return torch.rand(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))

    def make_minibatches(self, seed: int, sizes: Iterable[int] = (2, 2, 2)) -> list[Minibatch]:
        """Return one minibatch per domain, of different brightness."""
        labels = torch.arange(seed, seed + 9) % len(CLASS_NAMES)
        return [(self.make_images(n, 9 * seed + i) / 2 + i / 6, labels[i : i + n]) for i, n in enumerate(sizes)]

    def train(self, algorithm: Algorithm, first: int = 0, score: bool = False) -> Algorithm:
        """Make the updates from `first` on as the training loop, with predictions between them if `score`."""
        for step in range(first, UPDATES):
            if score:
                predict(algorithm, self.make_images(1))
            seed_everything(step)
            algorithm.update(self.make_minibatches(step))
        return algorithm

    @cached_property
    def trained(self) -> Algorithm:
        """The trained algorithm, which no check changes."""
        return self.train(self.build())


def check_constructor(case: AlgorithmCase) -> None:
    """The constructor is DomainBed's. Class names come by keyword if it has one, else in hparams."""
    try:
        inspect.signature(case.cls).bind((3, 64, 64), 3, 3, {})
    except TypeError as error:
        arguments = "(input_shape, num_classes, num_domains, hparams)"
        raise AssertionError(f"{error}. Take {arguments}, in this order") from error
    algorithm, x = case.build(), case.make_images(2)
    assert hasattr(algorithm, "hparams"), "it has no hparams. Call super().__init__ with all four arguments"
    if any("class_names" in inspect.signature(base.__init__).parameters for base in case.cls.__mro__):
        seed_everything(0)
        shape, hparams = (3, case.size, case.size), case.hparams | {"steps": UPDATES}
        same = torch.equal(predict(case.cls(shape, 3, 3, hparams, class_names=CLASS_NAMES), x), predict(algorithm, x))
        assert same, "class_names=[...] and hparams['class_names'] give different predictions. Treat both in one way"


def check_update(case: AlgorithmCase) -> None:
    """`update` returns finite numbers by name and does not write on its images."""
    minibatches = case.make_minibatches(0, (2, 1, 3))
    copies = [x.clone() for x, _ in minibatches]
    metrics = case.build().update(minibatches, None)
    assert isinstance(metrics, Mapping) and metrics, f"got {metrics!r}, expected numbers to log, e.g. {{'loss': 0.1}}"
    for key, value in metrics.items():
        if isinstance(value, Tensor):
            assert value.dim() == 0, f"{key} is {value!r}, expected one number. Reduce it, e.g. by mean()"
            assert not value.requires_grad, f"{key} is {value!r}, which holds the step's graph in memory. Detach it"
        assert math.isfinite(value), f"{key} is {value!r}, expected a finite number. Look for log(0) and 0 / 0"
    same = all(torch.equal(x, copy) for (x, _), copy in zip(minibatches, copies, strict=True))
    assert same, "it writes on the images that it is given, expected no change. Work on x.clone()"


def check_parameters(case: AlgorithmCase) -> None:
    """Updates change all parameters with `requires_grad` and no others: a model file stores exactly these."""
    before, after = (dict(algorithm.named_parameters()) for algorithm in (case.build(), case.trained))
    declared = {name for name, p in after.items() if p.requires_grad}
    moved = {name for name, p in after.items() if not torch.equal(before[name], p)}
    idle, frozen = sorted(declared - moved), sorted(moved - declared)
    assert not idle, f"no update moves {idle[:3]}. Give them to an optimizer or set requires_grad = False"
    assert not frozen, f"updates move {frozen[:3]}, whose requires_grad is False. Set it to True"
    assert declared or case.cls.STEPS == 1, "nothing trains, expected a parameter. Set STEPS = 1 if this is intended"


def check_predict(case: AlgorithmCase) -> None:
    """`predict` returns finite logits (B, C) in both modes, also of one image and for other classes."""
    for names, x in ((CLASS_NAMES, case.make_images(1)), (CLASS_NAMES[:2], case.make_images(5))):
        algorithm = case.build(names=names)
        for logits in (algorithm.predict(x), predict(algorithm, x)):
            got, expected = tuple(logits.shape), (len(x), len(names))
            assert got == expected, f"got shape {got}, expected (images, num_classes), {expected}. Use the arguments"
            assert logits.isfinite().all(), f"got {logits}, expected finite logits. Look for log(0) and 0 / 0"


def check_predict_per_image(case: AlgorithmCase) -> None:
    """A prediction depends on its own image only, unless the method says that it is transductive."""
    if case.cls.describe_protocol(case.hparams).get("transductive"):
        return
    x = case.make_images(6)
    together, turned = predict(case.trained, x), predict(case.trained, x.flip(0)).flip(0)
    alone = torch.cat([predict(case.trained, image[None]) for image in x])
    largest = max(1.0, together.abs().max().item())
    error = max((logits - together).abs().max().item() / largest for logits in (alone, turned))
    assert error < 1e-5, (
        f"logits of single or reordered images are off by {error:.1g}, expected 0. In evaluation mode use no random "
        "numbers and no statistics of the batch, or declare transductive in describe_protocol"
    )


def check_seeds(case: AlgorithmCase) -> None:
    """The same seeds train the same weights, bit for bit, also with predictions between the updates."""
    name = find_difference(case.trained.state_dict(), case.train(case.build(), score=True).state_dict())
    assert not name, (
        f"the same seeds, with predictions between updates, give another {name}. Draw from the global generators of "
        "random, numpy and torch, which the training loop seeds, and change nothing in predict"
    )


def check_state_dict(case: AlgorithmCase) -> None:
    """Another instance predicts the same, bit for bit, with `state_dict` or `trained_state`."""
    x = case.make_images(4)
    for name, state in (("state_dict", case.trained.state_dict()), ("trained_state", case.trained.trained_state())):
        other = case.build(seed=9)
        predict(other, x)  # a cache must not outlive its weights
        other.load_state_dict(state, strict=name == "state_dict")
        assert torch.equal(predict(other, x), predict(case.trained, x)), (
            f"another instance with its {name}() gives other predictions. Register all that a prediction needs as "
            "parameter or buffer, and compute what is cached anew when they change"
        )


def check_resume(case: AlgorithmCase) -> None:
    """A run that is stopped and resumed ends with the same weights, bit for bit, as one that is not."""
    stopped, resumed, file = case.build(), case.build(), io.BytesIO()
    seed_everything(0)
    stopped.update(case.make_minibatches(0))
    torch.save(stopped.training_state(), file)
    try:
        resumed.load_training_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    except Exception as error:  # torch raises all kinds
        raise AssertionError(f"{error}. Return tensors and plain values only from training_state") from error
    states = []
    for algorithm in (case.trained, case.train(resumed, first=1)):
        counters = {f"attribute {k}": v for k, v in vars(algorithm).items() if isinstance(v, (int, float))}
        states.append(algorithm.state_dict() | counters)
    name = find_difference(*states)
    assert not name, (
        f"a resumed run has another {name}. Return all that update changes from training_state and set it in "
        "load_training_state; both have the attributes that are optimizers and schedules already"
    )


def check_accumulate(case: AlgorithmCase) -> None:
    """`backward` multiplies its gradients by `weight`: with `accumulate`, those of the parts add up to the step's."""
    algorithm, gradients = case.build(), []
    if not isinstance(algorithm, ClipAlgorithm):
        return
    for weight in (1.0, 0.5):
        algorithm.zero_grad()
        seed_everything(0)
        algorithm.backward(case.make_minibatches(7, (4, 3, 2)), weight)
        gradients.append({name: p.grad / weight for name, p in algorithm.named_parameters() if p.grad is not None})
    name = find_difference(*gradients)
    assert not name, (
        f"backward(minibatches, 0.5) is not half of backward(minibatches, 1.0) in {name}. Use weight * loss"
    )


def check_record_values(case: AlgorithmCase) -> None:
    """`describe_protocol` and `diagnose` return plain finite values, which a record in JSON can hold."""
    terms, algorithm = case.cls.describe_protocol(case.hparams), case.trained
    missing = sorted({"weights", "template", "transductive", "source_free"} - terms.keys())
    assert not missing, f"describe_protocol has no {missing}. Return super().describe_protocol(hparams) | {{...}}"
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    with evaluation_mode(algorithm):
        numbers = [algorithm.diagnose(minibatches) for minibatches in ([], case.make_minibatches(3))]
    for method, values in (("describe_protocol", terms), ("diagnose", numbers)):
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            got = f"{method}: got {values}, expected plain finite values"
            raise AssertionError(f"{got} ({error}). Convert tensors by item() or tolist()") from error
    name = find_difference(before, algorithm.state_dict())
    assert not name, f"diagnose changes {name}, expected no change. Compute on copies"


def check_merge(case: AlgorithmCase) -> None:
    """`merge` returns a plain CLIP with the same image features, or a UsageError that names what prevents it."""
    algorithm, h, x = case.trained.eval(), case.hparams, case.make_images(3)
    if not isinstance(algorithm, ClipAlgorithm) or h["clip_pretrained"] == "random":
        return
    try:
        weights = algorithm.merge()
    except UsageError as refusal:
        named = case.name in str(refusal) or f"prompt={h['prompt']}" in str(refusal)
        assert named, f"got {refusal!r}, expected the algorithm or prompt that prevents a plain CLIP. Name it"
        return
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_clip(find_clip(h["clip_model"], h["clip_pretrained"]), weights, Path(folder))
        features = load_clip("", f"local-dir:{folder}").visual(x)
        error = (unit(features) - unit(algorithm.encode(x))).abs().max().item()
    assert error < 1e-4, f"the plain CLIP's image features are off by {error:.1g}. Fold in all that trains, or refuse"


ALGORITHM_CHECKS: tuple[Callable[[AlgorithmCase], None], ...] = (
    check_constructor,
    check_update,
    check_parameters,
    check_predict,
    check_predict_per_image,
    check_seeds,
    check_state_dict,
    check_resume,
    check_accumulate,
    check_record_values,
    check_merge,
)


def make_text(case: AlgorithmCase) -> tuple[TextSide, Any, Tensor]:
    """Return a case's text side in evaluation mode, a CLIP's image tower, and random image features (4, E)."""
    seed_everything(0)
    clip = load_clip(case.hparams["clip_model"], case.hparams["clip_pretrained"])
    text = load(PROMPTS, "prompt", case.hparams["prompt"])(clip, CLASS_NAMES, DeclaredHparams("It", case.hparams))
    return text.eval(), clip.visual, unit(torch.randn(4, clip.embed_dim))


@torch.no_grad()
def check_text_features(case: AlgorithmCase) -> None:
    """`encode` returns unit-norm features of the classes, (C, E), or (B, C, E) where they depend on the images."""
    text, _, images = make_text(case)
    if not text.TEXT:
        return
    features = text.encode(images, None)
    got, expected = tuple(features.shape), (*([4] if text.PER_IMAGE else []), len(CLASS_NAMES), images.shape[1])
    assert got == expected, f"encode: got shape {got}, expected {expected} with PER_IMAGE = {text.PER_IMAGE}"
    norms = features.norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-4, f"encode: got features of length {norms}, expected 1. Use prompts.base.unit"
    same = text.PER_IMAGE or torch.equal(text.encode(-images, None), features)
    assert same, "encode depends on the images and is cached. Return (B, C, E) and set PER_IMAGE = True"


def check_text_optimizer(case: AlgorithmCase) -> None:
    """`make_optimizer` returns an optimizer of all parameters with `requires_grad`, None where there are none."""
    text, _, _ = make_text(case)
    optimizer, trains = text.make_optimizer(), text.trains(text.hparams)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    missing = [key for key, p in text.named_parameters() if p.requires_grad and id(p) not in given]
    assert not missing, f"make_optimizer leaves out {missing[:3]}. Add them or set requires_grad = False"
    assert trains == bool(given), f"TRAINS is {trains}, but {len(given)} parameters have an optimizer. Correct TRAINS"


@torch.no_grad()
def check_text_attach(case: AlgorithmCase) -> None:
    """`attach` changes the image tower only where CHANGES_TOWER is True: else its features are computed once."""
    text, tower, _ = make_text(case)
    before = tower(case.make_images(2))
    text.attach(tower)
    changed = not torch.equal(tower(case.make_images(2)), before)
    assert changed == text.CHANGES_TOWER, f"attach changes image features: {changed}. Set CHANGES_TOWER = {changed}"


TEXT_SIDE_CHECKS = (check_text_features, check_text_optimizer, check_text_attach)


def check_hparams(cls: Any) -> None:
    """Every default and every draw has one type, passes the hparam's limits and can stand in JSON."""
    for name, hparam in cls.HPARAMS.items():
        assert isinstance(hparam, HParam), (
            f"HPARAMS[{name!r}] is {hparam!r}, expected HParam(default, sample, help=...)"
        )
        for variant in [hparam, *map(hparam.for_dataset, hparam.by_dataset)]:
            for value in [variant.default, *(variant.draw(name, seed) for seed in range(20))]:
                same = type(value) is type(variant.default)
                assert same, f"{name}: drew {value!r}, expected the type of its default {variant.default!r}. Convert it"
                try:
                    json.dumps(variant.check(name, value))
                except (UsageError, TypeError) as error:
                    raise AssertionError(f"{error}. Correct the default, the sampler or the limits") from error
    complete = "batch_size" in cls.HPARAMS or not issubclass(cls, Algorithm)
    assert complete, "HPARAMS has no batch_size, which loaders read. Start from Algorithm.HPARAMS | {...}"


def check_facts(spec: DatasetSpec) -> None:
    """The facts of a data set fit together."""
    envs, names, folders = spec.environments, spec.class_names or range(spec.num_classes), spec.domain_folders
    numbers = {"image_size": spec.image_size, "steps": spec.steps, "checkpoint_freq": spec.checkpoint_freq}
    assert len(set(envs)) == len(envs) >= 2, f"got environments {envs}, expected at least 2 different ones"
    unique = len(set(names)) == len(names) == spec.num_classes >= 2
    assert unique, f"got class_names {names}, expected num_classes, {spec.num_classes}, different ones, at least 2"
    assert min(numbers.values()) >= 1, f"got {numbers}, expected at least 1 for all"
    complete = all(len(counts) == len(envs) for counts in spec.builds.values())
    assert complete, f"got image_counts {spec.builds}, expected one number for each of {envs}"
    if spec.build is None:
        assert spec.folder, "it has neither folder nor build. Give the folder under --data_dir that holds its images"
        assert len(set(folders)) == len(folders) == len(envs), (
            f"got domain_folders {folders}, expected one for each of {envs}"
        )
        assert list(names) == sorted(names), (
            f"got class_names {names}. Sort them: DomainBed numbers sorted class folders"
        )


def check_images(spec: DatasetSpec, data_dir: Path) -> None:
    """Images and labels are as the spec says, and the same when the data set is opened again."""
    environments, again = (open_dataset(spec, data_dir, Preprocess(spec.image_size)).environments for _ in range(2))
    counts, known, seen = tuple(map(len, environments)), list(spec.builds.values()), set[int]()
    assert len(counts) == len(spec.environments), f"got {len(counts)} environments, expected {spec.environments}"
    assert not known or counts in known, f"got {counts} images, expected {known}. Correct image_counts or the data"
    for name, images, others in zip(spec.environments, environments, again, strict=True):
        labels, shape, got = images.labels, (3, spec.image_size, spec.image_size), f"{name}: got labels {images.labels}"
        good = labels.dtype == np.int64 and labels.shape == (len(images),)
        assert good, f"{got}, {labels.dtype}, expected {len(images)} of int64. Give each image one"
        same = np.array_equal(labels, others.labels)
        for i in {0, len(images) - 1}:
            view = images.load_evaluation_view(i)
            assert view.shape == shape, f"{name}, image {i}: got {view.shape}, expected {shape}. Make it an RGB image"
            same = same and np.array_equal(view, others.load_evaluation_view(i))
        assert same, f"{name}: images or labels differ when they are read again. Make them from a fixed seed"
        seen.update(labels.tolist())
    wrong = sorted(seen ^ set(range(spec.num_classes)))
    assert not wrong, f"labels {wrong} are missing or too large, expected all of 0 to {spec.num_classes - 1}"


def predict(algorithm: Algorithm, x: Tensor) -> Tensor:
    """Return logits as scoring does: in evaluation mode, without gradients. Training mode follows."""
    with evaluation_mode(algorithm):
        return algorithm.predict(x)


def find_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the first name whose values are not the same bits, "" if there is none."""
    for name in [*a, *b]:
        x, y = a.get(name), b.get(name)
        if not (torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y):
            return name
    return ""
