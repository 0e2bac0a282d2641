"""Numbers first, then text or LaTeX from the same numbers; layout and averaging as DomainBed's collect_results.py."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from domainbed_hp import registry
from domainbed_hp.model_selection import LeaveOneOut, SelectionMethod


@dataclass(frozen=True)
class Cell:
    """Mean and standard error over n trials, in percent; no mean: nothing to show. An average of cells has no err."""

    mean: float | None = None
    err: float | None = None
    n: int = 0

    def format(self, plus_minus: str) -> str:
        """E.g. `98.0 +/- 0.2`, `98.0` without an error, `X` without a mean."""
        if self.mean is None:
            return "X"
        return f"{self.mean:.1f}" if self.err is None else f"{self.mean:.1f} {plus_minus} {self.err:.1f}"


@dataclass(frozen=True)
class Table:
    """One table of numbers, `cells[row][column]`; the last column is the average. No dataset: the table of averages."""

    dataset: str | None
    method: SelectionMethod
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]

    def grid(self, plus_minus: str) -> list[list[str]]:
        """All cells as strings, without the header."""
        rows = zip(self.rows, self.cells, strict=True)
        return [[row, *(cell.format(plus_minus) for cell in cells)] for row, cells in rows]


def cell(accs: Sequence[float]) -> Cell:
    """100 * mean and 100 * std (ddof 0) / sqrt(n) of accuracies in [0, 1]."""
    if not len(accs):
        return Cell()
    return Cell(100 * float(np.mean(accs)), 100 * float(np.std(accs)) / len(accs) ** 0.5, len(accs))


def average(cells: Sequence[Cell]) -> Cell:
    """Unweighted mean of means; nothing if one of them is missing."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    return Cell(sum(means) / len(means), None, min(cell.n for cell in cells)) if len(means) == len(cells) else Cell()


def row_order(frame: pd.DataFrame, planned: Sequence[str] = ()) -> tuple[str, ...]:
    """Algorithms as registered, then unknown ones as first seen; of one: as `planned`, its bare name, its labels."""
    algorithms = [*registry.ALGORITHMS, *frame["algorithm"].unique()]
    rows = frame[["row", "algorithm"]].drop_duplicates("row").itertuples(index=False, name=None)

    def place(pair: tuple[str, str]) -> tuple:
        row, algorithm = pair
        plan = planned.index(row) if row in planned else len(planned)
        return algorithms.index(algorithm), plan, row != algorithm, row

    return tuple(row for row, _ in sorted(rows, key=place))


def environments(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Dataset -> labels of its environments; as registered, then unknown ones as first seen, labelled 0, 1, ..."""
    # DEVIATION: DomainBed drops a dataset that it does not know.
    num_envs = frame.groupby("dataset", sort=False)["num_envs"].max()
    order = [name for name in registry.DATASETS if name in num_envs]
    labels = {name: tuple(registry.load(registry.DATASETS, "dataset", name).environments) for name in order}
    return {
        name: labels.get(name, ()) + tuple(str(i) for i in range(len(labels.get(name, ())), num_envs[name]))
        for name in dict.fromkeys([*order, *num_envs.index])
    }


def build(frame: pd.DataFrame, method: SelectionMethod, planned: Sequence[str] = ()) -> list[Table]:
    """One table per dataset, then the averages, from `records.frame`.

    A cell is over trials. In the averages a trial is first averaged over those of its environments that have a result.
    """
    rows, labels = row_order(frame, planned), environments(frame)
    chosen = method.select(frame)
    by_env = {key: list(accs) for key, accs in chosen.groupby(["row", "dataset", "test_env"])["test_acc"]}
    trial_means = chosen.groupby(["row", "dataset", "trial_seed"])["test_acc"].mean()
    by_dataset = {key: list(means) for key, means in trial_means.groupby(["row", "dataset"])}

    def averages(row: str, dataset: str) -> Cell:
        # DEVIATION: where no trial has an environment, DomainBed prints the mean over the remaining ones.
        complete = all((row, dataset, i) in by_env for i in range(len(labels[dataset])))
        return cell(by_dataset[row, dataset]) if complete else Cell()

    def table(dataset: str | None, columns: Sequence[str], cells: list[list[Cell]]) -> Table:
        return Table(dataset, method, rows, (*columns, "Avg"), tuple((*line, average(line)) for line in cells))

    return [
        *(
            table(name, envs, [[cell(by_env.get((row, name, i), [])) for i in range(len(envs))] for row in rows])
            for name, envs in labels.items()
        ),
        table(None, list(labels), [[averages(row, name) for name in labels] for row in rows]),
    ]


def gaps(tables: Iterable[Table], frame: pd.DataFrame, planned: Mapping[str, set[int]] | None = None) -> list[str]:
    """What the tables of datasets do not tell: one line for each cell that misses a trial.

    Expected are the trial seeds that the dataset has anywhere, and those that are `planned` for it.
    A row without any run on a dataset, or without the pairs that leave-one-out needs, gets one line in all.
    """
    lines = []
    for table in tables:
        if table.dataset is None:
            continue
        on_dataset = frame[frame["dataset"] == table.dataset]
        trials = len({*on_dataset["trial_seed"], *(planned or {}).get(table.dataset, ())})
        for row, cells in zip(table.rows, table.cells, strict=True):
            runs = on_dataset[on_dataset["row"] == row]
            if runs.empty:
                lines.append(f"{row}, {table.dataset}: no runs, hence X")
            elif table.method is LeaveOneOut and not (runs["test_envs"].map(len) == 2).any():
                who = row if (on_dataset["test_envs"].map(len) == 2).any() else "all rows"
                lines.append(
                    f"{who}, {table.dataset}: {table.method.name} needs runs with two test environments, "
                    "and there are none (a sweep with single_test_envs makes none), hence X"
                )
            else:
                lines += [
                    f"{row}, {table.dataset}, environment {env}: {cell.n} of {trials} trials ({table.method.name})"
                    for env, cell in zip(table.columns[:-1], cells[:-1], strict=True)
                    if cell.n < trials
                ]
    return list(dict.fromkeys(lines))


def to_text(tables: Iterable[Table], num_records: int) -> str:
    """DomainBed's plain layout: columns of 20 characters (averages: 25), two spaces between, one behind."""
    lines = [f"Total records: {num_records}"]
    for table in tables:
        what = "Averages" if table.dataset is None else f"Dataset: {table.dataset}"
        lines += ["", f"-------- {what}, model selection method: {table.method.name}"]
        grid = [["Algorithm", *table.columns], *table.grid("+/-")]
        # DEVIATION: DomainBed cuts what is longer than a column; here the columns of that table grow.
        width = max(25 if table.dataset is None else 20, *(len(text) for row in grid for text in row))
        lines += ["  ".join(text.ljust(width) for text in row) + " " for row in grid]
    return "\n".join(lines) + "\n"


LATEX = {character: "\\" + character for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a row these would be read as arguments of the \\ before it.
    "[": "{[}",
    "*": "{*}",
}


def escape(text: str) -> str:
    """Text as LaTeX prints it; characters that plain pdflatex has no letter for become their code, e.g. U+03BB."""
    known = [c for c in text if ord(c) < 256 and c not in "«»ÐÞðþ"]
    return "".join(LATEX.get(c, c if c in known else f"U+{ord(c):04X}") for c in text)


def to_latex(tables: Iterable[Table], num_records: int) -> str:
    """A document that compiles alone: a subsection per selection method, a booktabs table per dataset."""
    lines = [
        r"\documentclass{article}",
        r"\usepackage{booktabs,graphicx}",
        # DEVIATION: DomainBed shrinks wide tables with adjustbox, which small TeX installations lack.
        r"\newsavebox{\fitbox}",
        r"\newcommand{\fit}[1]{\sbox{\fitbox}{#1}%",
        r"  \ifdim\wd\fitbox>\textwidth\resizebox{\textwidth}{!}{\usebox{\fitbox}}\else\usebox{\fitbox}\fi}",
        r"\begin{document}",
        r"\section{Full DomainBed results}",
        f"% Total records: {num_records}",
    ]
    method = None
    for table in tables:
        if table.method is not method:
            method = table.method
            lines += ["", rf"\subsection{{Model selection: {escape(method.name)}}}"]
        # DEVIATION: names are escaped and never cut; DomainBed cuts \textbf{...} within its braces.
        header = [rf"\textbf{{{escape(text)}}}" for text in ("Algorithm", *table.columns)]
        grid = [[escape(row), *cells] for row, *cells in table.grid(r"$\pm$")]
        lines += [
            "",
            rf"\subsubsection{{{escape(table.dataset or 'Averages')}}}",
            r"\begin{center}",
            r"\fit{%",
            rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in grid),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{center}",
        ]
    return "\n".join([*lines, r"\end{document}"]) + "\n"
