"""Hyperparameters: each one is a default and a sampler that draws from a stream seeded by its own name.

As in DomainBed's hparams_registry.py a new hparam therefore never moves another one's draw.
They are declared beside the code that reads them, as `Algorithm.HPARAMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed_hp.registry import ALGORITHMS, SHARPNESS, WEIGHT_AVERAGES, UsageError, load, unknown_name
from domainbed_hp.seeds import seed_hash

SMALL_IMAGES = ("Debug28",)
"""Data sets that DomainBed gives larger learning rates and batches."""


@dataclass(frozen=True)
class HParam:
    """One hyperparameter; without `sample` a random draw keeps the default."""

    default: Any
    sample: Callable[[np.random.RandomState], Any] | None = None
    help: str = ""
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    below: float | None = None
    plugins: dict[str, str] | None = None
    """A table of `registry` that the value is a name in; what it stands for brings `HPARAMS` and `validate`."""

    def draw(self, name: str, seed: int) -> Any:
        """The value of random seed `seed`; numpy scalars become Python's, so that JSON can hold them."""
        if self.sample is None:
            return self.default
        value = self.sample(np.random.RandomState(seed_hash(seed, name)))
        return value.item() if isinstance(value, np.generic) else value

    def check(self, name: str, value: Any) -> Any:
        """`value`, with an int widened to float where the default is one; `UsageError` where it does not fit."""
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


def log_uniform(base: float, low: float, high: float) -> Callable[[np.random.RandomState], float]:
    """Sampler of base^U(low, high)."""
    return lambda r: base ** r.uniform(low, high)


def choice(*values: Any) -> Callable[[np.random.RandomState], Any]:
    """Sampler of one of `values`."""
    return lambda r: r.choice(values)


TRAINING_HPARAMS = {
    "average": HParam("none", plugins=WEIGHT_AVERAGES, help="weights over time that are scored: none, or a name"),
    "sharpness": HParam("none", plugins=SHARPNESS, help="climb before each step: none, or a name"),
}
"""What the harness does for every algorithm."""


def known(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, HParam]:
    """The hparams of a run of `algorithm` that makes the choices in `overrides`; imports the algorithm.

    A choice from a table of plugins, such as prompt=coop, brings hparams of its own.
    """
    table: dict[str, HParam] = TRAINING_HPARAMS | load(ALGORITHMS, "algorithm", algorithm).hparams_for(dataset)
    for plugin in chosen(table, overrides or {}).values():
        table = plugin.HPARAMS | table
    return table


def chosen(table: Mapping[str, HParam], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the choices in `values`, or by default, stand for."""
    choices = {name: (h.plugins, values.get(name, h.default)) for name, h in table.items() if h.plugins is not None}
    return {name: load(t, name, v) for name, (t, v) in choices.items() if isinstance(v, str) and v != "none"}


def default_hparams(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The defaults, `hparams_seed` 0, under the choices in `overrides`."""
    return {name: h.default for name, h in known(algorithm, dataset, overrides).items()}


def random_hparams(
    algorithm: str, dataset: str, seed: int, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One random draw of every hparam, under the choices in `overrides`."""
    return {name: h.draw(name, seed) for name, h in known(algorithm, dataset, overrides).items()}


def resolve(
    algorithm: str, dataset: str, hparams_seed: int, trial_seed: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The hparams of one run: defaults or a draw, then `overrides`, checked against the known names and types.

    Source of the seeds: DomainBed's scripts/train.py, `random_hparams(..., seed_hash(hparams_seed, trial_seed))`.
    """
    table = known(algorithm, dataset, overrides)
    if hparams_seed == 0:
        hparams = default_hparams(algorithm, dataset, overrides)
    else:
        hparams = random_hparams(algorithm, dataset, seed_hash(hparams_seed, trial_seed), overrides)
    for name, value in overrides.items():
        # DEVIATION: DomainBed takes any name and any type, and trains with the default.
        if name not in table:
            raise UsageError(f"{unknown_name(f'hparam of {algorithm}', name, table)}{comes_with(name, table)}")
        hparams[name] = table[name].check(name, value)
    for plugin in chosen(table, hparams).values():
        plugin.validate(hparams)
    load(ALGORITHMS, "algorithm", algorithm).validate(hparams)
    return hparams


def check_validation(hparams: Mapping[str, Any], images: bool) -> None:
    """`UsageError` where the average of weights looks at validation images and there are none."""
    average = hparams.get("average", "none")
    if average != "none" and not images and load(WEIGHT_AVERAGES, "average", average).VALIDATES:
        raise UsageError(f"average={average} needs validation images: --holdout_fraction above 0")


def comes_with(name: str, table: Mapping[str, HParam]) -> str:
    """Which choices would bring hparam `name`, in words."""
    choices = [(choice, h.plugins, v) for choice, h in table.items() if h.plugins is not None for v in h.plugins]
    found = [f"{choice}={v}" for choice, plugins, v in choices if name in load(plugins, choice, v).HPARAMS]
    return f". It comes with {' or '.join(found)}" if found else ""
