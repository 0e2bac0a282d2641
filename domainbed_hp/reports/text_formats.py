"""Tables as text (DomainBed's own layout), Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
from tabulate import tabulate

from domainbed_hp.reports.missing import describe
from domainbed_hp.reports.report import Report
from domainbed_hp.reports.tables import Cell, Table

DAGGER = "†"


def to_text(report: Report) -> str:
    """DomainBed's plain layout: columns of 20 characters (averages: 25), two spaces between, one behind."""
    lines = [f"Total records: {report.num_records}"]
    for table in report.tables:
        what = "Averages" if table.dataset is None else f"Dataset: {table.dataset}"
        lines += ["", f"-------- {what}, model selection method: {table.method.name}"]
        grid = [table.header, *table.grid(lambda i, j, cell: cell.format("+/-"))]
        # DEVIATION: DomainBed cuts what is longer than a column; here the columns of that table grow.
        width = max(25 if table.dataset is None else 20, *(len(text) for row in grid for text in row))
        lines += ["  ".join(text.ljust(width) for text in row) + " " for row in grid]
    for paper in report.published:
        shown = tabulate(paper.lines(), paper.header, disable_numparse=True)
        lines += ["", f"-------- {paper.title}", *shown.splitlines(), *paper.notes()]
    return "\n".join(lines) + "\n"


def to_markdown(report: Report) -> str:
    """A section per selection method; the best of a column bold, incomplete cells marked and explained."""
    lines = ["# Results", "", f"{report.num_records:,} records."]
    for method, tables in report.by_method():
        lines += ["", f"## Model selection: {method.name}"]
        for table in tables:
            lines += ["", f"### {escaped(table.title)}", "", pipes(table.header, marked(table))]
            if notes := report.lacking(table):
                lines += ["", f"{DAGGER} Incomplete, for want of:", "", *(f"- {escaped(note)}" for note in notes)]
    for paper in report.published:
        lines += ["", f"## {paper.title}", "", pipes(paper.header, paper.lines())]
        lines += [line for note in paper.notes() for line in ("", note)]
    return "\n".join(lines) + "\n"


def marked(table: Table) -> list[list[str]]:
    """The lines of a table; the best bold, the second in italics, what is incomplete with a dagger."""
    ranks = table.ranks()

    def show(i: int, j: int, cell: Cell) -> str:
        text = cell.format("±")
        text = {1: f"**{text}**", 2: f"*{text}*"}.get(ranks[i][j], text)
        return text + DAGGER if cell.missing else text

    return table.grid(show)


def pipes(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[escaped(text) if j == 0 else text for j, text in enumerate(line)] for line in lines]
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(cells, [escaped(h) for h in header], tablefmt="pipe", colalign=align, disable_numparse=True)


def escaped(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return "".join("\\" + c if c in r"\`*_[]<>|#" else c for c in text)


def long_form(report: Report) -> pd.DataFrame:
    """One line per cell."""
    rows = []
    for table in report.tables:
        for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
            told = {f"{cost.header}_{cost.unit}": cost.values[i] for cost in table.costs}
            for column, cell in zip(table.columns, cells, strict=True):
                place = {"selection": table.method.name, "dataset": table.title, "row": row, "column": column}
                rows.append({**place, **asdict(cell), **told})
    return pd.DataFrame(rows)


def to_csv(report: Report) -> str:
    """One line per cell: means and errors in percent, unrounded."""
    return str(long_form(report).to_csv(index=False))


def to_json(report: Report) -> str:
    """Everything that the tables know, and where it comes from."""
    published = [{"title": t.title, "header": t.header, "rows": t.lines()} for t in report.published]
    content = {
        "records": report.num_records,
        "cells": json.loads(long_form(report).to_json(orient="records", double_precision=15)),
        "missing": describe(report.missing),
        "published": published,
        "notes": report.notes,
        "provenance": report.provenance,
    }
    return json.dumps(content, indent=1) + "\n"
