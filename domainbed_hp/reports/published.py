"""Numbers that papers report, set beside ours and never averaged with them; `published.toml` holds them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

DATASETS = ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet")


@dataclass(frozen=True)
class Published:
    """One row of one source. Accuracies in percent; what a source does not say is missing."""

    method: str
    source: str
    accs: Mapping[str, float]
    """Data set -> average over its environments; `Avg`: over all five data sets, as the source prints it."""
    errs: Mapping[str, float]
    environments: Mapping[str, Sequence[float]]
    """Data set -> accuracy on each environment."""
    weights: str
    target: str
    """Which part of the target environment was scored."""
    selection: str
    remark: str


@dataclass(frozen=True)
class PublishedTable:
    """Rows of papers under columns of ours."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    rows: tuple[Published, ...]

    @property
    def header(self) -> list[str]:
        return ["Published", *self.columns, "source", "weights", "target", "selection"]

    def lines(self) -> list[list[str]]:
        told = [[row.source, row.weights, row.target, row.selection] for row in self.rows]
        return [[row.method, *cells, *t] for row, cells, t in zip(self.rows, self.cells, told, strict=True)]

    def notes(self) -> list[str]:
        """What letters stand for, and what is peculiar to a row."""
        used = {letter for row in self.rows for letter in row.source.split(", ")}
        sources = "; ".join(f"{letter}: {text}" for letter, text in load()[0].items() if letter in used)
        remarks = "; ".join(f"{row.method} ({row.source}): {row.remark}" for row in self.rows if row.remark)
        protocols = "Protocols differ from row to row and from ours: see target and selection."
        return [f"Sources: {sources}.", *([f"Remarks: {remarks}."] if remarks else []), protocols]


@cache
def load() -> tuple[dict[str, str], tuple[Published, ...]]:
    """(letter -> source, rows)."""
    content: dict[str, Any] = tomllib.loads((resources.files(__package__) / "published.toml").read_text())
    unknown = {"weights": "not stated", "target": "not stated", "selection": "not stated", "remark": ""}
    rows = []
    for row in content["row"]:
        accs = {name: row[name] for name in (*DATASETS, "Avg") if name in row}
        errs = {name: row[f"{name}_err"] for name in DATASETS if f"{name}_err" in row}
        told = {name: row.get(name, content["defaults"].get(name, default)) for name, default in unknown.items()}
        rows.append(Published(row["method"], row["source"], accs, errs, row.get("environments", {}), **told))
    return content["sources"], tuple(rows)


def beside(labels: Mapping[str, Sequence[str]]) -> list[PublishedTable]:
    """What was published on the data sets of `labels` (-> their environments); empty for data sets nobody published."""
    _, rows = load()
    found = []
    for dataset in (name for name in DATASETS if name in labels):
        known = [row for row in rows if dataset in row.environments]
        cells = tuple(tuple(f"{acc:.1f}" for acc in row.environments[dataset]) for row in known)
        if known:
            title = f"Published on {dataset}, by environment (CLIP ViT-B/16)"
            found.append(PublishedTable(title, tuple(labels[dataset]), cells, tuple(known)))
    columns = [name for name in DATASETS if name in labels]
    known = [row for row in rows if any(name in row.accs for name in columns)]
    if known:
        shown = (*columns, "Avg")
        cells = tuple(tuple(number(row, name) for name in shown) for row in known)
        found.append(PublishedTable("Published averages (CLIP ViT-B/16)", shown, cells, tuple(known)))
    return found


def number(row: Published, name: str) -> str:
    if name not in row.accs:
        return "-"
    return f"{row.accs[name]:.1f}" + (f" ± {row.errs[name]:.1f}" if name in row.errs else "")
