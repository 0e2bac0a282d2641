"""Hyperparameters: each one is a default and a sampler that draws from a stream seeded by its own name.

As in DomainBed's hparams_registry.py a new hparam therefore never moves another one's draw.
They are declared beside the code that reads them, as `Algorithm.HPARAMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed_hp.registry import ALGORITHMS, AVERAGES, SHARPNESS, UsageError, load, unknown
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
    plugins: dict[str, str] | None = None
    """A table of `registry` that the value is a name in; what it stands for brings `HPARAMS` of its own."""

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
        if self.plugins is not None and value not in (self.default, "none"):
            load(self.plugins, name, value)
        if self.choices and value not in self.choices:
            raise UsageError(f"hparam {name}: got {value!r}, known: {', '.join(map(repr, self.choices))}")
        if self.at_least is not None and not value >= self.at_least:
            raise UsageError(f"hparam {name}: got {value!r}, expected at least {self.at_least:g}")
        return value


def log_uniform(base: float, low: float, high: float) -> Callable[[np.random.RandomState], float]:
    """Sampler of base^U(low, high)."""
    return lambda r: base ** r.uniform(low, high)


def choice(*values: Any) -> Callable[[np.random.RandomState], Any]:
    """Sampler of one of `values`."""
    return lambda r: r.choice(values)


TRAINING_HPARAMS = {
    "average": HParam("none", plugins=AVERAGES, help="weights over time that are scored: none, or a name"),
    "sharpness": HParam("none", plugins=SHARPNESS, help="climb before each step: none, or a name"),
}
"""What the harness does for every algorithm."""


def known(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, HParam]:
    """The hparams of a run of `algorithm` that makes the choices in `overrides`; imports the algorithm.

    A choice from a table of plugins, such as prompt=coop, brings hparams of its own.
    """
    table: dict[str, HParam] = TRAINING_HPARAMS | load(ALGORITHMS, "algorithm", algorithm).hparams_for(dataset)
    for name, hparam in list(table.items()):
        value = (overrides or {}).get(name, hparam.default)
        if hparam.plugins is not None and value != "none" and isinstance(value, str):
            table = load(hparam.plugins, name, value).HPARAMS | table
    return table


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """The defaults, `hparams_seed` 0."""
    return {name: h.default for name, h in known(algorithm, dataset).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """One random draw of every hparam."""
    return {name: h.draw(name, seed) for name, h in known(algorithm, dataset).items()}


def resolve(
    algorithm: str, dataset: str, hparams_seed: int, trial_seed: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The hparams of one run: defaults or a draw, then `overrides`, checked against the known names and types.

    Source of the seeds: DomainBed's scripts/train.py, `random_hparams(..., seed_hash(hparams_seed, trial_seed))`.
    """
    table = known(algorithm, dataset, overrides)
    if hparams_seed == 0:
        hparams = {name: h.default for name, h in table.items()}
    else:
        hparams = {name: h.draw(name, seed_hash(hparams_seed, trial_seed)) for name, h in table.items()}
    for name, value in overrides.items():
        # DEVIATION: DomainBed takes any name and any type, and trains with the default.
        if name not in table:
            raise unknown(f"hparam of {algorithm}", name, table)
        hparams[name] = table[name].check(name, value)
    load(ALGORITHMS, "algorithm", algorithm).validate(hparams)
    return hparams
