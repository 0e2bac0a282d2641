"""Hyperparameters: a default, and a sampler that draws from a stream seeded by the hparam's name.

A new hparam therefore never changes the draw of another, as in DomainBed's hparams_registry.py. Hparams are declared in
the class that reads them, as `Algorithm.HPARAMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from domainbed_hp.registry import ALGORITHMS, SHARPNESS, WEIGHT_AVERAGES, UsageError, load, unknown_name
from domainbed_hp.seeds import seed_hash

SMALL_IMAGES = ("Debug28",)
"""Data sets that have larger learning rates and batches in DomainBed."""


@dataclass(frozen=True)
class HParam:
    """One hyperparameter. A random draw of one without `sample` is its default."""

    default: Any
    sample: Callable[[np.random.RandomState], Any] | None = None
    help: str = ""
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    below: float | None = None
    plugins: dict[str, Any] | None = None
    """Table of `registry` whose names are the values. The named class has more hparams."""
    by_dataset: Mapping[str, HParam] = field(default_factory=dict)
    """Default and sampler on single data sets, by the data set's name."""

    def for_dataset(self, dataset: str) -> HParam:
        """Return this hparam with its default and sampler on `dataset`."""
        if dataset not in self.by_dataset:
            return self
        variant = self.by_dataset[dataset]
        return replace(self, default=variant.default, sample=variant.sample)

    def draw(self, name: str, seed: int) -> Any:
        """Return the draw of seed `seed` as a Python scalar."""
        if self.sample is None:
            return self.default
        value = self.sample(np.random.RandomState(seed_hash(seed, name)))
        return value.item() if isinstance(value, np.generic) else value

    def check(self, name: str, value: Any) -> Any:
        """Return `value`, as a float where the default is one. `UsageError` for a wrong type or range."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UsageError(
                f"hparam {name}: got {value!r} ({type(value).__name__}), "
                f"expected {kind.__name__}, e.g. {self.default!r}"
            )
        if self.choices and value not in self.choices:
            raise UsageError(f"hparam {name}: got {value!r}, known: {', '.join(map(repr, self.choices))}")
        if self.at_least is not None and not value >= self.at_least:
            raise UsageError(f"hparam {name}: got {value!r}, expected at least {self.at_least:g}")
        if self.below is not None and not value < self.below:
            raise UsageError(f"hparam {name}: got {value!r}, expected less than {self.below:g}")
        return value


class DeclaredHparams(dict[str, Any]):
    """The hparams that an algorithm is built with. Reading one that it does not declare is a `UsageError`."""

    def __init__(self, algorithm: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.algorithm = algorithm

    def __missing__(self, name: str) -> Any:
        raise UsageError(
            f"{self.algorithm} reads hparam {name!r} and does not declare it. Declare its default in the class that "
            f"reads it: HPARAMS = Algorithm.HPARAMS | {{{name!r}: HParam(default)}}"
        )


def log_uniform(base: float, low: float, high: float) -> Callable[[np.random.RandomState], float]:
    """Return a sampler of base^U(low, high)."""
    return lambda r: base ** r.uniform(low, high)


def choice(*values: Any) -> Callable[[np.random.RandomState], Any]:
    """Return a sampler of one of `values`."""
    return lambda r: r.choice(values)


TRAINING_HPARAMS = {
    "average": HParam("none", plugins=WEIGHT_AVERAGES, help="average of the weights over training: none, or a name"),
    "sharpness": HParam("none", plugins=SHARPNESS, help="sharpness-aware training step: none, or a name"),
}
"""Hparams of every algorithm, which the training loop reads."""


def known_hparams(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, HParam]:
    """Return the hparams of `algorithm`, which is imported, on `dataset`.

    A choice in `overrides`, such as prompt=coop, adds the hparams of the class that it names.
    """
    table: dict[str, HParam] = TRAINING_HPARAMS | load(ALGORITHMS, "algorithm", algorithm).HPARAMS
    on_dataset = {name: hparam.for_dataset(dataset) for name, hparam in table.items()}
    for plugin in load_chosen_plugins(on_dataset, overrides or {}).values():
        table = plugin.HPARAMS | table
    return {name: hparam.for_dataset(dataset) for name, hparam in table.items()}


def load_chosen_plugins(table: Mapping[str, HParam], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class that each hparam with `plugins` names, by its value in `values` or its default."""
    names = {name: (h.plugins, values.get(name, h.default)) for name, h in table.items() if h.plugins is not None}
    return {name: load(t, name, v) for name, (t, v) in names.items() if isinstance(v, str) and v != "none"}


def default_hparams(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the default of every hparam, `hparams_seed` 0, under the choices in `overrides`."""
    return {name: h.default for name, h in known_hparams(algorithm, dataset, overrides).items()}


def random_hparams(
    algorithm: str, dataset: str, seed: int, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return one random draw of every hparam, under the choices in `overrides`."""
    return {name: h.draw(name, seed) for name, h in known_hparams(algorithm, dataset, overrides).items()}


def resolve_hparams(
    algorithm: str, dataset: str, hparams_seed: int, trial_seed: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the hparams of one run: the defaults or a random draw, with `overrides` in their place.

    Source of the seeds: DomainBed's scripts/train.py, `random_hparams(..., seed_hash(hparams_seed, trial_seed))`.

    Raises:
        UsageError: an override has an unknown name or a wrong type, or values do not go together.
    """
    table = known_hparams(algorithm, dataset, overrides)
    seed = seed_hash(hparams_seed, trial_seed)
    hparams = {name: h.default if hparams_seed == 0 else h.draw(name, seed) for name, h in table.items()}
    for name, value in overrides.items():
        # DEVIATION: DomainBed takes any name and any type, and trains with the default.
        if name not in table:
            raise UsageError(f"{unknown_name(f'hparam of {algorithm}', name, table)}{name_choices_with(name, table)}")
        hparams[name] = table[name].check(name, value)
    for plugin in load_chosen_plugins(table, hparams).values():
        plugin.validate(hparams)
    load(ALGORITHMS, "algorithm", algorithm).validate(hparams)
    return hparams


def check_validation_images(hparams: Mapping[str, Any], available: bool) -> None:
    """Raise `UsageError` if the weight average needs validation images and none are `available`."""
    average = hparams.get("average", "none")
    if average != "none" and not available and load(WEIGHT_AVERAGES, "average", average).VALIDATES:
        raise UsageError(f"average={average} needs validation images: pass --holdout_fraction above 0")


def name_choices_with(name: str, table: Mapping[str, HParam]) -> str:
    """Return a sentence on the choices that add hparam `name`, "" if there are none."""
    choices = [(choice, h.plugins, v) for choice, h in table.items() if h.plugins is not None for v in h.plugins]
    bringing = [f"{choice}={v}" for choice, plugins, v in choices if name in load(plugins, choice, v).HPARAMS]
    return f". It comes with {' or '.join(bringing)}" if bringing else ""
