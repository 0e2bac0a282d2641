"""Numbers that papers report, shown next to ours and never averaged with them; `published.toml` holds them."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

DATASETS = ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet")


@dataclass(frozen=True)
class PublishedRow:
    """One row of one source. Accuracies are in percent; a number that the source lacks has no entry."""

    method: str
    source: str
    accs: Mapping[str, float]
    """Data set -> average over its environments; `Avg` -> average over all five data sets, as the source prints it."""
    errs: Mapping[str, float]
    environments: Mapping[str, Sequence[float]]
    """Data set -> accuracy on each environment."""
    weights: str
    target: str
    """The part of the target environment that was scored."""
    selection: str
    remark: str


@dataclass(frozen=True)
class PublishedTable:
    """Published rows under the columns of our tables."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    rows: tuple[PublishedRow, ...]

    @property
    def header(self) -> list[str]:
        return ["Published", *self.columns, "source", "weights", "target", "selection"]

    def format_lines(self) -> list[list[str]]:
        pairs = zip(self.rows, self.cells, strict=True)
        return [[r.method, *cells, r.source, r.weights, r.target, r.selection] for r, cells in pairs]

    def list_notes(self) -> list[str]:
        """Return the names of the sources by their letters, the remarks on rows, and a warning."""
        used = {letter for row in self.rows for letter in row.source.split(", ")}
        sources = "; ".join(f"{letter}: {text}" for letter, text in load_published()[0].items() if letter in used)
        remarks = "; ".join(f"{row.method} ({row.source}): {row.remark}" for row in self.rows if row.remark)
        protocols = "Protocols differ from row to row and from ours: see target and selection."
        return [f"Sources: {sources}.", *([f"Remarks: {remarks}."] if remarks else []), protocols]


@cache
def load_published() -> tuple[dict[str, str], tuple[PublishedRow, ...]]:
    """Return (letter -> source, rows) of published.toml."""
    content: dict[str, Any] = tomllib.loads((resources.files(__package__) / "published.toml").read_text())
    defaults = {"weights": "not stated", "target": "not stated", "selection": "not stated", "remark": ""}
    defaults |= content["defaults"]
    rows = []
    for row in content["row"]:
        accs = {name: row[name] for name in (*DATASETS, "Avg") if name in row}
        errs = {name: row[f"{name}_err"] for name in DATASETS if f"{name}_err" in row}
        texts = {name: row.get(name, default) for name, default in defaults.items()}
        rows.append(PublishedRow(row["method"], row["source"], accs, errs, row.get("environments", {}), **texts))
    return content["sources"], tuple(rows)


def make_published_tables(environments: Mapping[str, Sequence[str]]) -> list[PublishedTable]:
    """Return the published tables for the data sets of `environments` (data set -> names of its environments)."""
    _, rows = load_published()
    tables = []
    for dataset in (name for name in DATASETS if name in environments):
        known = [row for row in rows if dataset in row.environments]
        cells = tuple(tuple(f"{acc:.1f}" for acc in row.environments[dataset]) for row in known)
        if known:
            title = f"Published on {dataset}, by environment (CLIP ViT-B/16)"
            tables.append(PublishedTable(title, tuple(environments[dataset]), cells, tuple(known)))
    columns = [name for name in DATASETS if name in environments]
    known = [row for row in rows if any(name in row.accs for name in columns)]
    if known:
        columns.append("Avg")
        cells = tuple(tuple(format_accuracy(row, name) for name in columns) for row in known)
        tables.append(PublishedTable("Published averages (CLIP ViT-B/16)", tuple(columns), cells, tuple(known)))
    return tables


def format_accuracy(row: PublishedRow, column: str) -> str:
    """Return e.g. `95.6 ± 0.8`, or `-` where the source does not give the number."""
    if column not in row.accs:
        return "-"
    return f"{row.accs[column]:.1f}" + (f" ± {row.errs[column]:.1f}" if column in row.errs else "")
