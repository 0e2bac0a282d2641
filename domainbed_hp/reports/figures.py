"""Pictures of the same numbers as the tables. Readable in grey and by colour-blind readers: rows differ in marker, too.

Every function returns a matplotlib figure; nothing is shown, and no global state of matplotlib is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open

from domainbed_hp.model_selection import IIDAccuracy, SelectionMethod
from domainbed_hp.reports.load import Collected, Run
from domainbed_hp.reports.tables import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which stay apart for colour-blind readers."""
MARKERS = "osD^vPX<>*"
LINES = ("-", "--", "-.", ":")
LINE = 0.22
"""Inches of a line of a legend."""
LOSSES = ("loss", "ce", "contrastive")
"""What methods call the loss that they train by."""


def styles(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each row."""
    each = zip(rows, cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return {row: {"color": colour, "marker": marker, "linestyle": line} for row, colour, marker, line in each}


def plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def canvas(columns: int, height: float = 3.2, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def legend(figure: Figure, axis: Axes, columns: int = 3) -> None:
    """Below the axes, in as many lines as the labels need: the figure grows by them."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(columns, 2) if max(map(len, labels), default=0) > 25 else columns
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def accuracies(table: Table) -> Figure:
    """Accuracy of each row on each environment, with standard errors."""
    figure, (axis,) = canvas(1, 2.8, 1.2 + 1.3 * len(table.columns))
    x = np.arange(len(table.columns))
    look = styles(table.rows)
    for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
        offset = (i - (len(table.rows) - 1) / 2) * 0.8 / len(table.rows)
        means = [np.nan if cell.mean is None else cell.mean for cell in cells]
        errs = [cell.err or 0.0 for cell in cells]
        style = look[row] | {"linestyle": "none"}
        axis.errorbar(x + offset, means, errs, label=plain(row), capsize=2.5, markersize=5, **style)
    axis.set_xticks(x, [plain(name) for name in table.columns])
    for edge in x[:-1] + 0.5:
        axis.axvline(edge, color="0.9", linewidth=0.8)
    axis.set_ylabel("target accuracy (%)")
    axis.set_title(plain(f"{table.title}, {table.method.name}"), fontsize="medium")
    legend(figure, axis)
    return figure


def curves(frame: pd.DataFrame, dataset: str, rows: Sequence[str]) -> Figure:
    """Training loss (each method's own), validation accuracy (training environments) and target accuracy by step.

    Means over runs; the band is one standard deviation over runs.
    """
    scores = scored(frame[frame["dataset"] == dataset])
    shown = {"val_acc": "validation accuracy (%)", "test_acc": "target accuracy (%)"}
    if losses := [name for name in LOSSES if name in scores and scores[name].notna().any()]:
        scores = scores.assign(training_loss=scores[losses].bfill(axis=1).iloc[:, 0])
        shown = {"training_loss": "training loss"} | shown
    figure, axes = canvas(len(shown), 3.0)
    look = styles(rows)
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        for row in rows:
            factor = 100 if name.endswith("acc") else 1
            by_step = factor * scores[scores["row"] == row].groupby("step")[name].agg(["mean", "std"]).dropna(how="all")
            if by_step.empty:
                continue
            band = by_step["std"].fillna(0)
            every = max(1, len(by_step) // 8)
            axis.plot(by_step.index, by_step["mean"], label=plain(row), markersize=4, markevery=every, **look[row])
            low, high = by_step["mean"] - band, by_step["mean"] + band
            axis.fill_between(by_step.index, low, high, color=look[row]["color"], alpha=0.15, linewidth=0)
        axis.set_xlabel("step")
        axis.set_title(title, fontsize="medium")
    figure.suptitle(plain(dataset), fontsize="medium")
    legend(figure, axes[-1])
    return figure


def selection(frame: pd.DataFrame, dataset: str, rows: Sequence[str]) -> Figure:
    """Validation against target accuracy of every record: does choosing by the one choose by the other?

    Spearman's rank correlation is taken within each (row, trial, test environment) and averaged over them.
    """
    scores = scored(frame[frame["dataset"] == dataset])
    figure, (axis,) = canvas(1, 3.8, 4.8)
    look = styles(rows)
    for row in rows:
        here = scores[scores["row"] == row]
        if here.empty:
            continue
        groups = [group[["val_acc", "test_acc"]] for _, group in here.groupby(["trial_seed", "test_env"])]
        ranks = [np.corrcoef(g.rank().to_numpy().T)[0, 1] for g in groups if len(g) > 2 and (g.nunique() > 1).all()]
        label = f"{row} (rank correlation {np.mean(ranks):+.2f})" if ranks else row
        style = {"color": look[row]["color"], "marker": look[row]["marker"]}
        axis.scatter(
            100 * here["val_acc"], 100 * here["test_acc"], s=16, alpha=0.7, label=plain(label), linewidths=0, **style
        )
    axis.grid(axis="x", color="0.9", linewidth=0.8)
    axis.set_xlabel("validation accuracy (%)")
    axis.set_ylabel("target accuracy (%)")
    axis.set_title(plain(dataset), fontsize="medium")
    legend(figure, axis, columns=1)
    return figure


def scored(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of runs with one test environment, with `val_acc` and `test_acc` of training-domain validation."""
    return IIDAccuracy.candidates(frame)


def gates(values: np.ndarray, title: str) -> Figure:
    """Gates (layers, heads) of a trained model; 1 is where they started."""
    layers, heads = values.shape
    figure = Figure(figsize=(1.8 + 0.42 * heads, 1.2 + 0.34 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = max(2.0, float(values.max()))
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=top)
    for layer in range(layers):
        for head in range(heads):
            ink = "white" if values[layer, head] < 0.55 * top else "black"
            axis.text(head, layer, f"{values[layer, head]:.2f}", ha="center", va="center", color=ink, fontsize=6)
    axis.set_xticks(range(heads), [str(i) for i in range(1, heads + 1)])
    axis.set_yticks(range(layers), [str(i) for i in range(1, layers + 1)])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(plain(title), fontsize="small")
    figure.colorbar(image, label="gate")
    return figure


def learned_gates(run: Run) -> np.ndarray | None:
    """(layers, heads) of a run's model.safetensors; None where it has no gates or was not saved.

    Formulas as in `networks/heads.py`, in evaluation.
    """
    path = Path(run.folder) / "model.safetensors"
    kind = run.hparams.get("gates", "none")
    if kind == "none" or not path.is_file():
        return None
    with safe_open(path, "np") as file:
        logits = [(name, file.get_tensor(name)) for name in file.keys() if name.endswith("gate_logits")]  # noqa: SIM118
    if not logits:
        return None
    found = np.stack([value for _, value in sorted(logits, key=lambda pair: [natural(p) for p in pair[0].split(".")])])
    if kind == "sigmoid":
        return np.asarray(2 / (1 + np.exp(-found)))
    if kind == "hard":
        order = np.argsort(np.argsort(-found, axis=1, kind="stable"), axis=1)
        return np.where(order < run.hparams["gate_keep"], 1.0, 0.0)
    shifted = np.exp(found - found.max(axis=1, keepdims=True))
    return np.asarray(found.shape[1] * shifted / shifted.sum(axis=1, keepdims=True))


def natural(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)


def selected_runs(collected: Collected, method: SelectionMethod = IIDAccuracy) -> list[Run]:
    """The run that a selection method chooses, of each row, data set and test environment: in its first trial."""
    frame = collected.frame
    first = method.select(frame).drop_duplicates(["row", "dataset", "test_env"])
    place = ["row", "dataset", "trial_seed", "hparams_seed"]
    single = frame[frame["test_envs"].map(len) == 1].assign(test_env=lambda f: f["test_envs"].map(lambda envs: envs[0]))
    runs = first.merge(single[[*place, "test_env", "run"]].drop_duplicates(), on=[*place, "test_env"])["run"]
    return [collected.runs[i] for i in dict.fromkeys(runs)]


def all_figures(collected: Collected, tables: Sequence[Table]) -> dict[str, Figure]:
    """File name without ending -> figure: what `scripts/plot` writes and the page shows."""
    found = {}
    for table in tables:
        if table.dataset is None or all(cell.mean is None for cells in table.cells for cell in cells):
            continue
        name = slug(table.dataset)
        rows = [row for row, cells in zip(table.rows, table.cells, strict=True) if any(cell.n for cell in cells)]
        found[f"{name}-accuracy"] = accuracies(table)
        found[f"{name}-curves"] = curves(collected.frame, table.dataset, rows)
        found[f"{name}-selection"] = selection(collected.frame, table.dataset, rows)
    for run in selected_runs(collected):
        values = learned_gates(run)
        if values is not None:
            envs = "-".join(map(str, run.args["test_envs"]))
            where = f"{run.row} on {run.args['dataset']}, test environment {envs}, trial {run.args['trial_seed']}"
            found[f"{slug(run.args['dataset'])}-gates-{slug(run.row)}-env{envs}"] = gates(values, where)
    return found


def slug(text: str) -> str:
    """Letters and digits of a name, for a file."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())
