"""Figures of the numbers in the tables, readable in grey and by colour-blind readers: rows differ in marker, too.

Drawing functions return a matplotlib figure, and neither show it nor change the global state of matplotlib.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from domainbed_hp.model_selection import IIDAccuracy, SelectionMethod
from domainbed_hp.records import read_records
from domainbed_hp.reports.load import CollectedRuns
from domainbed_hp.reports.rows import Run
from domainbed_hp.reports.tables import Table, check_keys
from domainbed_hp.run_args import find_differences

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The palette of Okabe and Ito for colour-blind readers."""
MARKERS = "osD^vPX<>*"
LINES = ("-", "--", "-.", ":")
LEGEND_LINE = 0.22
"""Height of a line of a legend, in inches."""
LOSSES = ("loss", "ce", "contrastive")
"""Keys under which algorithms record the loss that they train by."""


def make_styles(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line of every row."""
    styles = zip(rows, cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return {row: {"color": colour, "marker": marker, "linestyle": line} for row, colour, marker, line in styles}


def escape_formula(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def make_axes(columns: int, height: float = 3.2, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes side by side, each of `height` and `width` in inches."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure, axis: Axes, columns: int = 3) -> None:
    """Add a legend below the axes, and make the figure higher by its lines."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(columns, 2) if max(map(len, labels), default=0) > 25 else columns
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_accuracies(table: Table) -> Figure:
    """Draw the accuracy of every row on every environment, with standard errors."""
    figure, (axis,) = make_axes(1, 2.8, 1.2 + 1.3 * len(table.columns))
    x = np.arange(len(table.columns))
    styles = make_styles(table.rows)
    for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
        offset = (i - (len(table.rows) - 1) / 2) * 0.8 / len(table.rows)
        means = [np.nan if cell.mean is None else cell.mean for cell in cells]
        errs = [cell.err or 0.0 for cell in cells]
        style = styles[row] | {"linestyle": "none"}
        axis.errorbar(x + offset, means, errs, label=escape_formula(row), capsize=2.5, markersize=5, **style)
    axis.set_xticks(x, [escape_formula(name) for name in table.columns])
    for edge in x[:-1] + 0.5:
        axis.axvline(edge, color="0.9", linewidth=0.8)
    axis.set_ylabel("target accuracy (%)")
    axis.set_title(escape_formula(f"{table.title}, {table.method.name}"), fontsize="medium")
    add_legend(figure, axis)
    return figure


def draw_curves(frame: pd.DataFrame, dataset: str, rows: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Draw `names` (by default the training loss), validation accuracy and target accuracy of the records by step.

    Lines are means over runs, bands one standard deviation.
    """
    records = IIDAccuracy.candidates(frame[frame["dataset"] == dataset])
    titles = {"val_acc": "validation accuracy (%)", "test_acc": "target accuracy (%)"}
    if names:
        titles = {name: name for name in names if records[name].notna().any()} | titles
    elif losses := [name for name in LOSSES if name in records and records[name].notna().any()]:
        records = records.assign(training_loss=records[losses].bfill(axis=1).iloc[:, 0])
        titles = {"training_loss": "training loss"} | titles
    figure, axes = make_axes(len(titles), 3.0)
    styles = make_styles(rows)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        factor = 100 if title.endswith("(%)") else 1
        for row in rows:
            numbers = records[records["row"] == row].groupby("step")[name]
            by_step = factor * numbers.agg(["mean", "std"]).dropna(how="all")
            if by_step.empty:
                continue
            mean, band, label = by_step["mean"], by_step["std"].fillna(0), escape_formula(row)
            every = max(1, len(by_step) // 8)
            axis.plot(by_step.index, mean, label=label, markersize=4, markevery=every, **styles[row])
            band_style = {"color": styles[row]["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(by_step.index, mean - band, mean + band, **band_style)
        axis.set_xlabel("step")
        axis.set_title(escape_formula(title), fontsize="medium")
    figure.suptitle(escape_formula(dataset), fontsize="medium")
    add_legend(figure, axes[-1])
    return figure


def draw_selection(frame: pd.DataFrame, dataset: str, rows: Sequence[str]) -> Figure:
    """Draw validation against target accuracy of every record, with Spearman's rank correlation in each row.

    The correlation is the mean over trials and test environments.
    """
    records = IIDAccuracy.candidates(frame[frame["dataset"] == dataset])
    figure, (axis,) = make_axes(1, 3.8, 4.8)
    styles = make_styles(rows)
    for row in rows:
        points = records[records["row"] == row]
        if points.empty:
            continue
        groups = [group[["val_acc", "test_acc"]] for _, group in points.groupby(["trial_seed", "test_env"])]
        ranks = [np.corrcoef(g.rank().to_numpy().T)[0, 1] for g in groups if len(g) > 2 and (g.nunique() > 1).all()]
        label = escape_formula(f"{row} (rank correlation {np.mean(ranks):+.2f})" if ranks else row)
        style = {"color": styles[row]["color"], "marker": styles[row]["marker"]}
        x, y = 100 * points["val_acc"], 100 * points["test_acc"]
        axis.scatter(x, y, s=16, alpha=0.7, label=label, linewidths=0, **style)
    axis.grid(axis="x", color="0.9", linewidth=0.8)
    axis.set_xlabel("validation accuracy (%)")
    axis.set_ylabel("target accuracy (%)")
    axis.set_title(escape_formula(dataset), fontsize="medium")
    add_legend(figure, axis, columns=1)
    return figure


def draw_gates(gates: np.ndarray, title: str) -> Figure:
    """Draw gates (layers, heads), which are 1 before training."""
    layers, heads = gates.shape
    figure = Figure(figsize=(1.8 + 0.42 * heads, 1.2 + 0.34 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = max(2.0, float(gates.max()))
    image = axis.imshow(gates, cmap="cividis", vmin=0, vmax=top)
    for layer in range(layers):
        for head in range(heads):
            colour = "white" if gates[layer, head] < 0.55 * top else "black"
            axis.text(head, layer, f"{gates[layer, head]:.2f}", ha="center", va="center", color=colour, fontsize=6)
    axis.set_xticks(range(heads), [str(i) for i in range(1, heads + 1)])
    axis.set_yticks(range(layers), [str(i) for i in range(1, layers + 1)])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(escape_formula(title), fontsize="small")
    figure.colorbar(image, label="gate")
    return figure


def read_gates(run: Run, step: int) -> tuple[int, np.ndarray] | None:
    """Return (step, gates (layers, heads)) of the record of `step`, or else of the last record with gates, or None."""
    gates = None
    for record in read_records(run.folder, []):  # again, since the table holds numbers only
        if record.get("gates") and not find_differences(run.args, record["args"]):
            gates = record["step"], np.array(record["gates"], dtype=float)
            if record["step"] == step:
                break
    return gates


def draw_chosen_gates(collected: CollectedRuns, method: type[SelectionMethod], notes: list[str]) -> dict[str, Figure]:
    """Draw the gates of the first trial's chosen run and step for each row, data set and test environment.

    A note names the runs that have gates, but none in their records.
    """
    figures, without = {}, []
    chosen = method.select(collected.frame).drop_duplicates(["row", "dataset", "test_env"])
    for index, chosen_step in zip(chosen["run"], chosen["step"], strict=True):
        run = collected.runs[index]
        if run.hparams.get("gates", "none") == "none":
            continue
        if step_and_gates := read_gates(run, chosen_step):
            step, gates = step_and_gates
            dataset, envs = run.args["dataset"], "-".join(map(str, run.args["test_envs"]))
            title = f"{run.row} on {dataset}, test environment {envs}, trial {run.args['trial_seed']}, step {step}"
            figures[f"{make_slug(dataset)}-gates-{make_slug(run.row)}-env{envs}"] = draw_gates(gates, title)
        else:
            without.append(run.folder)
    if without:
        folders = ", ".join(without)
        notes.append(f"gates are not drawn for runs whose records hold none (made by an earlier version): {folders}")
    return figures


def draw_figures(
    collected: CollectedRuns, tables: Sequence[Table], curves: Sequence[str] = (), notes: list[str] | None = None
) -> dict[str, Figure]:
    """Return file name without ending -> figure, of the tables of one selection method.

    `curves` are keys of the records to draw by step, see `draw_curves`. Warnings for the user are added to `notes`.

    Raises:
        UsageError: one of `curves` is not a number of the records.
    """
    check_keys(collected.frame, curves)
    figures = {}
    for table in tables:
        if table.dataset is None or all(cell.mean is None for cells in table.cells for cell in cells):
            continue
        name = make_slug(table.dataset)
        rows = [row for row, cells in zip(table.rows, table.cells, strict=True) if any(cell.n for cell in cells)]
        figures[f"{name}-accuracy"] = draw_accuracies(table)
        figures[f"{name}-curves"] = draw_curves(collected.frame, table.dataset, rows, curves)
        figures[f"{name}-selection"] = draw_selection(collected.frame, table.dataset, rows)
    if tables:
        figures |= draw_chosen_gates(collected, tables[0].method, [] if notes is None else notes)
    return figures


def make_slug(text: str) -> str:
    """Return the letters and digits of a name, with hyphens between words, for a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())
