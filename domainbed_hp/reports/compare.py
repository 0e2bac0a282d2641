"""Compare two rows of the tables, paired by trial and test environment."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from domainbed_hp import registry
from domainbed_hp.model_selection import SelectionMethod, load_selection_methods
from domainbed_hp.registry import UsageError
from domainbed_hp.reports.tables import list_environments

RESAMPLES = 9999
"""Number of resamples of the bootstrap, and of the permutation test unless it has fewer sign flips in all."""
LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of two rows over pairs, in points, with the p of a permutation test and a 95 % interval.

    Under the null hypothesis the rows could be swapped in any pair: the test flips the signs of pairs, in all ways if
    these are few, else at random. The interval is a bootstrap over the trials of each environment, whose n deviations
    from their mean are first stretched by sqrt(n / (n - 1)), because resampling alone underestimates the spread. Below
    two pairs there is no p. Without a second trial of every environment there is no interval.
    """

    where: str
    """The test environment, or "all"."""
    a: float
    """Mean accuracy of row a, in percent."""
    b: float
    n: int
    """Number of pairs."""
    trials: int
    """Smallest number of trials of an environment."""
    p: float | None
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return self.a - self.b

    def describe_warning(self) -> str:
        """Return the limits of p and interval with so few trials, "" if there are enough."""
        if 2.0 ** (1 - self.trials) < 1 - LEVEL:  # the smallest p that so many sign flips can give
            return ""
        trials = "1 trial" if self.trials == 1 else f"{self.trials} trials"
        least = 2.0 ** (1 - self.n)
        p = f"p cannot fall below {least:.3g}, and " if self.n > 1 and least > 1 - LEVEL else ""
        interval = "there is no interval" if self.trials == 1 else "the interval is too narrow"
        return f"with {trials} {p}{interval}" + (" and no p" if self.n == 1 else "")


@dataclass(frozen=True)
class Comparison:
    """Differences of two rows on one data set under one selection method: every environment, then all of them."""

    a: str
    b: str
    dataset: str
    method: type[SelectionMethod]
    differences: tuple[Difference, ...]
    left_out: int = 0
    """Number of pairs with an accuracy that is NaN."""

    HEADER = ("", "a", "b", "a - b", "95 % interval", "p", "pairs")

    @property
    def title(self) -> str:
        return f"{self.a} (a) minus {self.b} (b), {self.dataset}, model selection method: {self.method.name}"

    def format_lines(self) -> list[list[str]]:
        """Return the differences as text, one line for each, in the order of HEADER."""
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

    def list_warnings(self) -> list[str]:
        """Return a line for every warning about too few trials, and one for the pairs that are left out."""
        where: dict[str, list[str]] = {}
        for d in self.differences:
            where.setdefault(d.describe_warning(), []).append(d.where)
        lines = [f"{self.dataset}, {', '.join(names)}: {why}; run more trials" for why, names in where.items() if why]
        return lines + [f"{self.dataset}: {self.left_out} pairs hold NaN and are left out"] * bool(self.left_out)

    def to_text(self) -> str:
        table = tabulate(self.format_lines(), self.HEADER, disable_numparse=True)
        return "\n".join([f"-------- {self.title}", table, *(f"warning: {w}" for w in self.list_warnings())])


def compare_rows(frame: pd.DataFrame, a: str, b: str) -> list[Comparison]:
    """Compare rows `a` and `b` on every data set, under every selection method that has a choice for both.

    Raises:
        UsageError: a row is unknown, both are the same, or they share no trial and test environment.
    """
    rows = list(dict.fromkeys(frame["row"]))
    for name in (a, b):
        if name not in rows:
            raise registry.unknown_name("row", name, rows)
    if a == b:
        raise UsageError(f"--compare {a} {b}: a row cannot be compared with itself")
    comparisons = []
    for method in load_selection_methods():
        chosen = method.select(frame[frame["row"].isin([a, b])])
        for dataset, names in list_environments(frame).items():
            here = chosen[chosen["dataset"] == dataset]
            left_out = here.loc[here["test_acc"].isna(), ["test_env", "trial_seed"]].drop_duplicates()
            pairs = here.pivot_table(index=["test_env", "trial_seed"], columns="row", values="test_acc")
            if {a, b} <= set(pairs.columns) and len(pairs := pairs.dropna()):
                groups = {names[int(str(env))]: group for env, group in pairs.groupby(level="test_env")}
                all_envs = measure_difference("all", list(groups.values()), a, b)
                differences = [measure_difference(name, [group], a, b) for name, group in groups.items()]
                comparisons.append(Comparison(a, b, dataset, method, (*differences, all_envs), len(left_out)))
    if not comparisons:
        raise UsageError(f"--compare: {a} and {b} share no trial and test environment: there is nothing to pair")
    return comparisons


def measure_difference(where: str, groups: Sequence[pd.DataFrame], a: str, b: str) -> Difference:
    """Return the difference of the means over environments of the means over trials.

    `groups` has one frame per environment, with a line per trial and the columns `a` and `b`: accuracies in [0, 1].
    """
    means = {row: 100 * float(np.mean([group[row].mean() for group in groups])) for row in (a, b)}
    gaps = [100 * (group[a] - group[b]).to_numpy() for group in groups]
    n, trials = sum(map(len, gaps)), min(map(len, gaps))
    if n < 2:
        return Difference(where, means[a], means[b], n, trials, None, None, None)
    # The mean of means is a weighted mean of all pairs.
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
            warnings.simplefilter("ignore")  # scipy warns where all gaps are equal; the interval is that point
            interval = stats.bootstrap(
                stretched,
                lambda *samples, axis: np.mean([d.mean(axis) for d in samples], axis=0),
                method="percentile",
                vectorized=True,
                confidence_level=LEVEL,
                n_resamples=RESAMPLES,
                rng=0,
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Difference(where, means[a], means[b], n, trials, float(p), low, high)
