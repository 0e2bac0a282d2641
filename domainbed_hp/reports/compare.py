"""Two rows against each other, paired by trial and environment."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from domainbed_hp import registry
from domainbed_hp.model_selection import METHODS, SelectionMethod
from domainbed_hp.registry import UsageError
from domainbed_hp.reports.tables import environments

RESAMPLES = 9999
"""Of the bootstrap, and of the permutation test where all sign flips are more."""
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of row a minus row b over pairs, in points, with a 95 % bootstrap interval and the p of a permutation test.

    The test flips signs of pairs at random, all flips where they are few: under the null hypothesis the rows could be
    swapped in any pair. The interval resamples trials within each environment, whose n deviations are first stretched
    by sqrt(n / (n - 1)): resampling alone takes the sample's spread for the truth's. No p with fewer than two pairs,
    no interval where an environment has fewer than two.
    """

    where: str
    a: float
    b: float
    n: int
    trials: int
    """The fewest of an environment."""
    p: float | None
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return self.a - self.b

    def warning(self) -> str:
        """What so few trials cannot tell; empty where they can."""
        if 2.0 ** (1 - self.trials) < 1 - LEVEL:  # the smallest p of so many sign flips
            return ""
        trials = "1 trial" if self.trials == 1 else f"{self.trials} trials"
        least = 2.0 ** (1 - self.n)
        p = f"p cannot fall below {least:.3g}, and " if self.n > 1 and least > 1 - LEVEL else ""
        interval = "there is no interval" if self.trials == 1 else "the interval is too narrow"
        return f"with {trials} {p}{interval}" + (" and no p" if self.n == 1 else "")


@dataclass(frozen=True)
class Comparison:
    """Differences on one data set under one selection method: each environment, then all."""

    a: str
    b: str
    dataset: str
    method: SelectionMethod
    differences: tuple[Difference, ...]
    left_out: int = 0
    """Pairs with an accuracy that is NaN."""

    HEADER = ("", "a", "b", "a - b", "95 % interval", "p", "pairs")

    @property
    def title(self) -> str:
        return f"{self.a} (a) minus {self.b} (b), {self.dataset}, model selection method: {self.method.name}"

    def lines(self) -> list[list[str]]:
        return [
            [
                d.where,
                f"{d.a:.1f}",
                f"{d.b:.1f}",
                f"{d.mean:+.1f}",
                "" if d.low is None else f"{d.low:+.1f} to {d.high:+.1f}",
                "" if d.p is None else f"{d.p:.3f}",
                str(d.n),
            ]
            for d in self.differences
        ]

    def warnings(self) -> list[str]:
        """What is left out, and where there are too few pairs to tell, a line for each reason."""
        where: dict[str, list[str]] = {}
        for d in self.differences:
            where.setdefault(d.warning(), []).append(d.where)
        lines = [f"{self.dataset}, {', '.join(names)}: {why}; run more trials" for why, names in where.items() if why]
        return lines + [f"{self.dataset}: {self.left_out} pairs hold NaN and are left out"] * bool(self.left_out)

    def text(self) -> str:
        table = tabulate(self.lines(), self.HEADER, disable_numparse=True)
        return "\n".join([f"-------- {self.title}", table, *(f"warning: {w}" for w in self.warnings())])


def compare(frame: pd.DataFrame, a: str, b: str) -> list[Comparison]:
    """Rows `a` and `b` on every data set that both ran on, under every selection method that has a choice for both."""
    rows = list(dict.fromkeys(frame["row"]))
    for name in (a, b):
        if name not in rows:
            raise registry.unknown_name("row", name, rows)
    if a == b:
        raise UsageError(f"--compare {a} {b}: a row cannot be compared with itself")
    found = []
    for method in METHODS:
        chosen = method.select(frame[frame["row"].isin([a, b])])
        for dataset, labels in environments(frame).items():
            here = chosen[chosen["dataset"] == dataset]
            left_out = here.loc[here["test_acc"].isna(), ["test_env", "trial_seed"]].drop_duplicates()
            pairs = here.pivot_table(index=["test_env", "trial_seed"], columns="row", values="test_acc")
            if {a, b} <= set(pairs.columns) and len(pairs := pairs.dropna()):
                each = {labels[int(str(env))]: group for env, group in pairs.groupby(level="test_env")}
                all_envs = difference("all", list(each.values()), a, b)
                differences = [difference(label, [group], a, b) for label, group in each.items()]
                found.append(Comparison(a, b, dataset, method, (*differences, all_envs), len(left_out)))
    if not found:
        raise UsageError(f"{a} and {b} share no trial and test environment: there is nothing to pair")
    return found


def difference(where: str, groups: Sequence[pd.DataFrame], a: str, b: str) -> Difference:
    """Of the mean over environments of the mean over trials; `groups` are the pairs of each environment."""
    means = {row: 100 * float(np.mean([group[row].mean() for group in groups])) for row in (a, b)}
    gaps = [100 * (group[a] - group[b]).to_numpy() for group in groups]
    n, trials = sum(map(len, gaps)), min(map(len, gaps))
    if n < 2:
        return Difference(where, means[a], means[b], n, trials, None, None, None)
    # The mean of means, as a weighted mean of all pairs.
    weights = np.concatenate([np.full(len(gap), 1 / len(gap) / len(gaps)) for gap in gaps])
    p = stats.permutation_test(
        (np.concatenate(gaps),),
        lambda d, axis: (d * weights).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=0,
    ).pvalue
    low = high = None
    if trials > 1:
        stretched = [gap.mean() + (gap - gap.mean()) * (len(gap) / (len(gap) - 1)) ** 0.5 for gap in gaps]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all gaps equal: the interval is that point
            interval = stats.bootstrap(
                stretched,
                lambda *each, axis: np.mean([d.mean(axis) for d in each], axis=0),
                method="percentile",
                vectorized=True,
                confidence_level=LEVEL,
                n_resamples=RESAMPLES,
                rng=0,
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Difference(where, means[a], means[b], n, trials, float(p), low, high)
