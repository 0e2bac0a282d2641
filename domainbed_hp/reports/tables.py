"""Numbers first: tables of cells, averaged as DomainBed's collect_results.py; every format is made from these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from domainbed_hp import registry
from domainbed_hp.model_selection import LeaveOneOut, SelectionMethod
from domainbed_hp.reports.load import Collected
from domainbed_hp.reports.missing import Missing


@dataclass(frozen=True)
class Cell:
    """Mean and standard error over n trials, in percent; no mean: nothing to show. An average of cells has no err."""

    mean: float | None = None
    err: float | None = None
    n: int = 0
    missing: int = 0
    """Jobs that it lacks: what it shows is not what it will be."""

    def format(self, plus_minus: str) -> str:
        """E.g. `98.0 +/- 0.2`, `98.0` without an error, `X` without a mean."""
        if self.mean is None:
            return "X"
        return f"{self.mean:.1f}" if self.err is None else f"{self.mean:.1f} {plus_minus} {self.err:.1f}"


@dataclass(frozen=True)
class Cost:
    """A column that tells what a row costs: one number per row, or none."""

    header: str
    unit: str
    values: tuple[float | None, ...]

    def format(self) -> list[str]:
        return [
            "" if value is None else f"{value:,.{0 if value >= 100 or value % 1 == 0 else 1}f}" for value in self.values
        ]


@dataclass(frozen=True)
class Table:
    """One table of numbers, `cells[row][column]`; the last column is the average. No dataset: the table of averages."""

    dataset: str | None
    method: SelectionMethod
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    costs: tuple[Cost, ...] = ()

    @property
    def title(self) -> str:
        return self.dataset or "Averages"

    @property
    def header(self) -> list[str]:
        return ["Algorithm", *self.columns, *(f"{cost.header} ({cost.unit})" for cost in self.costs)]

    def grid(self, show: Callable[[int, int, Cell], str]) -> list[list[str]]:
        """All lines as strings, without the header; `show` makes a cell's of its row, column and content."""
        costs = [cost.format() for cost in self.costs]
        return [
            [row, *(show(i, j, cell) for j, cell in enumerate(cells)), *(cost[i] for cost in costs)]
            for i, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True))
        ]

    def ranks(self) -> list[list[int]]:
        """Of each cell in its column: 1 the best, 2 the second, 0 the others. Equal to a decimal is equal.

        A column with fewer than two means has no best.
        """
        ranks = [[0] * len(self.columns) for _ in self.rows]
        for j in range(len(self.columns)):
            shown = [None if cells[j].mean is None else round(cells[j].mean or 0, 1) for cells in self.cells]
            values = sorted({value for value in shown if value is not None and value == value}, reverse=True)
            if sum(value is not None for value in shown) > 1:
                for i, value in enumerate(shown):
                    ranks[i][j] = values.index(value) + 1 if value in values[:2] else 0
        return ranks


def cell(accs: Sequence[float], missing: int = 0) -> Cell:
    """100 * mean and 100 * std (ddof 0) / sqrt(n) of accuracies in [0, 1]."""
    if not len(accs):
        return Cell(missing=missing)
    return Cell(100 * float(np.mean(accs)), 100 * float(np.std(accs)) / len(accs) ** 0.5, len(accs), missing)


def average(cells: Sequence[Cell]) -> Cell:
    """Unweighted mean of means; nothing if one of them is missing."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    lacking = sum(cell.missing for cell in cells)
    if len(means) < len(cells):
        return Cell(missing=lacking)
    return Cell(sum(means) / len(means), None, min(cell.n for cell in cells), lacking)


def row_order(frame: pd.DataFrame, planned: Sequence[str] = ()) -> tuple[str, ...]:
    """Algorithms as registered, then unknown ones by name; of one: as `planned`, its bare name, its labels."""
    # DEVIATION: DomainBed shows unknown ones as first seen, which is as the file system lists folders.
    names = frame["algorithm"].unique()
    algorithms = [*registry.ALGORITHMS, *sorted(name for name in names if name not in registry.ALGORITHMS)]
    rows = frame[["row", "algorithm"]].drop_duplicates("row").itertuples(index=False, name=None)

    def place(pair: tuple[str, str]) -> tuple:
        row, algorithm = pair
        plan = planned.index(row) if row in planned else len(planned)
        return algorithms.index(algorithm), plan, row != algorithm, row

    return tuple(row for row, _ in sorted(rows, key=place))


def environments(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Dataset -> labels of its environments; as registered, then unknown ones by name, labelled 0, 1, ..."""
    # DEVIATION: DomainBed drops a dataset that it does not know.
    num_envs = frame.groupby("dataset")["num_envs"].max()
    order = [name for name in registry.DATASETS if name in num_envs]
    labels = {name: tuple(registry.load(registry.DATASETS, "dataset", name).environments) for name in order}
    return {
        name: labels.get(name, ()) + tuple(str(i) for i in range(len(labels.get(name, ())), num_envs[name]))
        for name in dict.fromkeys([*order, *num_envs.index])
    }


COSTS = {
    "params": ("parameters", "trained", "trainable_params", "max", 1),
    "step_time": ("step", "ms", "step_time", "median", 1e3),
    "memory": ("memory", "GB", "mem_gb", "max", 1),
}
"""Name on the command line -> header, unit, number of the records, how those of a row are brought to one, factor."""


def costs(frame: pd.DataFrame, rows: Sequence[str], names: Sequence[str]) -> tuple[Cost, ...]:
    """What the rows cost, of all their records but those of step 0, which pays for the start."""
    found = []
    for name in names:
        header, unit, column, how, factor = COSTS[name]
        later = frame[frame["step"] > 0] if name == "step_time" else frame
        values = later.groupby("row")[column].agg(how) * factor if column in frame else pd.Series(dtype=float)
        if name == "memory":
            values = values.replace(0, None)  # on a CPU nobody measured it
        found.append(Cost(header, unit, tuple(None if pd.isna(v) else float(v) for v in values.reindex(list(rows)))))
    return tuple(found)


def build(
    collected: Collected, method: SelectionMethod, missing: Sequence[Missing] = (), cost_names: Sequence[str] = ()
) -> list[Table]:
    """One table per dataset, then the averages.

    A cell is over trials. In the averages a trial is first averaged over those of its environments that have a result.
    """
    frame = collected.frame
    rows, labels = row_order(frame, collected.row_plan), environments(frame)
    chosen = method.select(frame)
    by_env = {key: list(accs) for key, accs in chosen.groupby(["row", "dataset", "test_env"])["test_acc"]}
    # Not pandas' mean, which would leave NaN out.
    trial_means = chosen.groupby(["row", "dataset", "trial_seed"])["test_acc"].agg(lambda accs: float(np.mean([*accs])))
    by_dataset = {key: list(means) for key, means in trial_means.groupby(["row", "dataset"])}
    lacking: dict[tuple[str, str, int], int] = {}
    for each in missing:
        for env in each.test_envs:
            if each.completes(each.row, each.dataset, env, method):
                key = each.row, each.dataset, env
                lacking[key] = lacking.get(key, 0) + 1

    def averages(row: str, dataset: str) -> Cell:
        envs = range(len(labels[dataset]))
        lacks = sum(lacking.get((row, dataset, i), 0) for i in envs)
        # DEVIATION: where no trial has an environment, DomainBed prints the mean over the remaining ones.
        complete = all((row, dataset, i) in by_env for i in envs)
        return cell(by_dataset[row, dataset] if complete else [], lacks)

    def table(dataset: str | None, columns: Sequence[str], cells: list[list[Cell]]) -> Table:
        told = costs(frame if dataset is None else frame[frame["dataset"] == dataset], rows, cost_names)
        lines = []
        for row, line in zip(rows, cells, strict=True):
            # Planned on a data set without a record, hence without a column.
            unseen = sum(n for (r, d, _), n in lacking.items() if r == row and d not in labels and dataset is None)
            mean = average(line)
            lines.append((*line, replace(mean, missing=mean.missing + unseen)))
        return Table(dataset, method, rows, (*columns, "Avg"), tuple(lines), told)

    return [
        *(
            table(
                name,
                envs,
                [
                    [cell(by_env.get((row, name, i), []), lacking.get((row, name, i), 0)) for i in range(len(envs))]
                    for row in rows
                ],
            )
            for name, envs in labels.items()
        ),
        table(None, list(labels), [[averages(row, name) for name in labels] for row in rows]),
    ]


def no_runs(tables: Sequence[Table], frame: pd.DataFrame) -> list[str]:
    """Rows without any run on a data set, a line each."""
    there = set(zip(frame["row"], frame["dataset"], strict=True))
    places = dict.fromkeys((row, table.dataset) for table in tables for row in table.rows if table.dataset)
    return [f"{row}, {dataset}: no runs, hence X" for row, dataset in places if (row, dataset) not in there]


def unpaired(tables: Sequence[Table], frame: pd.DataFrame) -> list[str]:
    """Why leave-one-out has cells that are X though no job is missing, a line each."""
    pairs = frame[frame["test_envs"].map(len) == 2]
    paired, there = (set(zip(f["row"], f["dataset"], strict=True)) for f in (pairs, frame))
    lines = []
    for table in tables:
        if table.dataset is None or table.method is not LeaveOneOut:
            continue
        at = dict(zip(table.rows, table.cells, strict=True))
        rows = [
            r
            for r in table.rows
            if (r, table.dataset) in there and any(c.mean is None and not c.missing for c in at[r])
        ]
        without = [row for row in rows if (row, table.dataset) not in paired]
        who = ["all rows"] if without == [row for row in table.rows if (row, table.dataset) in there] else without
        lines += [
            f"{row}, {table.dataset}: {table.method.name} needs runs with two test environments, "
            "and there are none (a sweep with single_test_envs makes none), hence X"
            for row in who
        ]
        lines += [
            f"{row}, {table.dataset}: {table.method.name} finds no step that a run and its pairs recorded once, hence X"
            for row in rows
            if row not in without
        ]
    return lines
