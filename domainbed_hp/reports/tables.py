"""Tables of results as numbers, averaged as by DomainBed's collect_results.py; every format is made from them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from domainbed_hp import registry
from domainbed_hp.model_selection import SelectionMethod
from domainbed_hp.reports.load import REQUIRED_ARGS, CollectedRuns
from domainbed_hp.reports.missing import MissingJob


@dataclass(frozen=True)
class Cell:
    """Mean and standard error of an accuracy over n trials, in percent; mean None: no result.

    A cell that is an average of cells has no err.
    """

    mean: float | None = None
    err: float | None = None
    n: int = 0
    missing: int = 0
    """Number of missing jobs, with which the mean may change."""

    def format(self, plus_minus: str) -> str:
        """Return e.g. `98.0 +/- 0.2`, `98.0` without an error, `X` without a mean."""
        if self.mean is None:
            return "X"
        return f"{self.mean:.1f}" if self.err is None else f"{self.mean:.1f} {plus_minus} {self.err:.1f}"


@dataclass(frozen=True)
class Statistic:
    """A column with a number for every row, or None where the records lack it."""

    name: str
    unit: str
    """Empty for a number that is shown by its key."""
    values: tuple[float | None, ...]

    @property
    def header(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def format(self) -> list[str]:
        """Return the numbers as text, empty for None."""

        def format_number(value: float) -> str:
            if self.unit:
                return f"{value:,.{0 if value >= 100 or value % 1 == 0 else 1}f}"
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

        return ["" if value is None else format_number(value) for value in self.values]


@dataclass(frozen=True)
class Table:
    """The results `cells[row][column]` on one data set under one selection method; the last column is the average.

    The table of averages has no dataset, and a column for each one.
    """

    dataset: str | None
    method: type[SelectionMethod]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    statistics: tuple[Statistic, ...] = ()

    @property
    def title(self) -> str:
        return self.dataset or "Averages"

    @property
    def header(self) -> list[str]:
        return ["Algorithm", *self.columns, *(statistic.header for statistic in self.statistics)]

    def format_lines(self, format_cell: Callable[[int, int, Cell], str]) -> list[list[str]]:
        """Return the lines below the header as text; `format_cell` takes the row, the column and the cell."""
        statistics = [statistic.format() for statistic in self.statistics]
        return [
            [row, *(format_cell(i, j, cell) for j, cell in enumerate(cells)), *(values[i] for values in statistics)]
            for i, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True))
        ]

    def rank_cells(self) -> list[list[int]]:
        """Return the rank of every cell in its column: 1 for the best, 2 for the second, 0 for the others.

        Means that are equal to one decimal share a rank. A column with fewer than two means has no best.
        """
        ranks = [[0] * len(self.columns) for _ in self.rows]
        for j in range(len(self.columns)):
            means = [None if cells[j].mean is None else round(cells[j].mean or 0, 1) for cells in self.cells]
            best = sorted({mean for mean in means if mean is not None and mean == mean}, reverse=True)[:2]
            if sum(mean is not None for mean in means) > 1:
                for i, mean in enumerate(means):
                    ranks[i][j] = best.index(mean) + 1 if mean in best else 0
        return ranks


def make_cell(accs: Sequence[float], missing: int = 0) -> Cell:
    """Return 100 * mean and 100 * std (ddof 0) / sqrt(n) of accuracies in [0, 1]."""
    if not len(accs):
        return Cell(missing=missing)
    return Cell(100 * float(np.mean(accs)), 100 * float(np.std(accs)) / len(accs) ** 0.5, len(accs), missing)


def average_cells(cells: Sequence[Cell]) -> Cell:
    """Return the unweighted mean of means, or no mean if one of them is missing."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    missing = sum(cell.missing for cell in cells)
    if len(means) < len(cells):
        return Cell(missing=missing)
    return Cell(sum(means) / len(means), None, min(cell.n for cell in cells), missing)


def order_rows(frame: pd.DataFrame, planned: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the rows by algorithm: those of the registry in its order, then unregistered ones by name.

    The rows of one algorithm come in the order of `planned`, then the row of the algorithm's name, then the others.
    """
    # DEVIATION: DomainBed shows unregistered ones as first seen, hence in the order of the file system.
    names = frame["algorithm"].unique()
    algorithms = [*registry.ALGORITHMS, *sorted(name for name in names if name not in registry.ALGORITHMS)]
    rows = frame[["row", "algorithm"]].drop_duplicates("row").itertuples(index=False, name=None)

    def sort_key(pair: tuple[str, str]) -> tuple:
        row, algorithm = pair
        position = planned.index(row) if row in planned else len(planned)
        return algorithms.index(algorithm), position, row != algorithm, row

    return tuple(row for row, _ in sorted(rows, key=sort_key))


def list_environments(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Return data set -> names of its environments, in the order of the registry, then unregistered ones by name."""
    # DEVIATION: DomainBed drops a dataset that it does not know.
    num_envs = frame.groupby("dataset")["num_envs"].max()
    order = [name for name in registry.DATASETS if name in num_envs]
    names = {name: tuple(registry.load(registry.DATASETS, "dataset", name).environments) for name in order}
    return {
        name: names.get(name, ()) + tuple(str(i) for i in range(len(names.get(name, ())), num_envs[name]))
        for name in dict.fromkeys([*order, *num_envs.index])
    }


COSTS = {
    "params": ("parameters", "trained", "trainable_params", "max", 1),
    "step_time": ("step", "ms", "step_time", "median", 1e3),
    "memory": ("memory", "GB", "mem_gb", "max", 1),
}
"""Name on the command line -> header, unit, key of the records, function over the records of a row, factor."""


def check_keys(frame: pd.DataFrame, keys: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raise `UsageError` for a key that is neither a number of the records nor in `more`."""
    known = [*more, *(name for name in frame.columns if name not in ("run", "row", "num_envs", *REQUIRED_ARGS))]
    for key in keys:
        if key not in known:
            raise registry.unknown_name("number in the records", key, known)


def make_statistics(
    frame: pd.DataFrame, chosen: pd.DataFrame, rows: Sequence[str], names: Sequence[str]
) -> tuple[Statistic, ...]:
    """Return a column for each name: one of `COSTS`, over all records, or the mean of a key over the chosen records.

    The time of a step is without step 0, which pays for the start.
    """
    statistics = []
    for name in names:
        if name in COSTS:
            header, unit, key, function, factor = COSTS[name]
            records = frame[frame["step"] > 0] if name == "step_time" else frame
        else:
            header, unit, key, function, factor, records = name, "", name, "mean", 1, chosen
        values = records.groupby("row")[key].agg(function) * factor if key in records else pd.Series(dtype=float)
        if name == "memory":
            values = values.replace(0, None)  # on a CPU nothing is measured
        by_row = values.reindex(list(rows))
        statistics.append(Statistic(header, unit, tuple(None if pd.isna(v) else float(v) for v in by_row)))
    return tuple(statistics)


def build_tables(
    collected: CollectedRuns,
    method: type[SelectionMethod],
    missing: Sequence[MissingJob] = (),
    statistics: Sequence[str] = (),
) -> list[Table]:
    """Return one table per data set, with means over trials, then the table of averages.

    For the averages, a trial is first averaged over its environments with a result.
    """
    frame = collected.frame
    rows, environments = order_rows(frame, collected.planned_labels), list_environments(frame)
    chosen = method.select(frame)
    accs_of = {key: list(accs) for key, accs in chosen.groupby(["row", "dataset", "test_env"])["test_acc"]}
    # Not pandas' mean, which would leave NaN out.
    trial_means = chosen.groupby(["row", "dataset", "trial_seed"])["test_acc"].agg(lambda accs: float(np.mean([*accs])))
    means_of = {key: list(means) for key, means in trial_means.groupby(["row", "dataset"])}
    num_missing = Counter(
        (job.row, job.dataset, env) for job in missing for env in job.test_envs if job.completes(env, method)
    )

    def make_average(row: str, dataset: str) -> Cell:
        envs = range(len(environments[dataset]))
        # DEVIATION: where no trial has an environment, DomainBed prints the mean over the remaining ones.
        complete = all((row, dataset, i) in accs_of for i in envs)
        return make_cell(means_of[row, dataset] if complete else [], sum(num_missing[row, dataset, i] for i in envs))

    def make_table(dataset: str | None, columns: tuple[str, ...], cells: list[list[Cell]]) -> Table:
        here, best = (f if dataset is None else f[f["dataset"] == dataset] for f in (frame, chosen))
        lines = []
        for row, line in zip(rows, cells, strict=True):
            average = average_cells(line)
            if dataset is None:  # jobs on a data set without a column count in the average
                others = sum(n for (r, d, _), n in num_missing.items() if r == row and d not in environments)
                average = replace(average, missing=average.missing + others)
            lines.append((*line, average))
        columns = (*columns, "Avg")
        return Table(dataset, method, rows, columns, tuple(lines), make_statistics(here, best, rows, statistics))

    tables = []
    for dataset, names in environments.items():
        keys = [[(row, dataset, i) for i in range(len(names))] for row in rows]
        cells = [[make_cell(accs_of.get(key, []), num_missing[key]) for key in line] for line in keys]
        tables.append(make_table(dataset, names, cells))
    averages = [[make_average(row, dataset) for dataset in environments] for row in rows]
    return [*tables, make_table(None, tuple(environments), averages)]


def describe_absent_rows(tables: Sequence[Table], frame: pd.DataFrame) -> list[str]:
    """Return a line for every row without any run on a data set of the tables."""
    present = set(zip(frame["row"], frame["dataset"], strict=True))
    places = dict.fromkeys((row, table.dataset) for table in tables for row in table.rows if table.dataset)
    return [f"{row}, {dataset}: no runs, so cells show X" for row, dataset in places if (row, dataset) not in present]


def explain_empty_cells(tables: Sequence[Table], frame: pd.DataFrame) -> list[str]:
    """Return a line with the method's reason for every row that has an X though no job is missing."""
    lines = []
    for table in tables:
        records = frame[frame["dataset"] == table.dataset]
        present = [row for row in table.rows if row in records["row"].unique()]
        reasons: dict[str, list[str]] = {}
        for row, cells in zip(table.rows, table.cells, strict=True):
            if row in present and any(cell.mean is None and not cell.missing for cell in cells):
                reasons.setdefault(table.method.explain(records[records["row"] == row]), []).append(row)
        for reason, rows in reasons.items():
            if reason:
                names = ["all rows"] if rows == present else rows
                lines += [f"{name}, {table.dataset}: {table.method.name} {reason}, so cells show X" for name in names]
    return lines
