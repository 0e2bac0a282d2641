"""Tables as text (DomainBed's own layout), Markdown, CSV and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
from tabulate import tabulate

from domainbed_hp.reports.missing import describe_jobs
from domainbed_hp.reports.report import Report
from domainbed_hp.reports.tables import Cell, Table

DAGGER = "†"


def to_text(report: Report) -> str:
    """Return DomainBed's layout: columns of 20 characters (averages: 25), separated by two spaces."""
    lines = [f"Total records: {report.num_records}"]
    for table in report.tables:
        title = "Averages" if table.dataset is None else f"Dataset: {table.dataset}"
        lines += ["", f"-------- {title}, model selection method: {table.method.name}"]
        grid = [table.header, *table.format_lines(lambda i, j, cell: cell.format("+/-"))]
        # DEVIATION: DomainBed cuts text that is longer than a column; here the columns of that table grow.
        width = max(25 if table.dataset is None else 20, *(len(text) for row in grid for text in row))
        lines += ["  ".join(text.ljust(width) for text in row) + " " for row in grid]
    for paper in report.published:
        shown = tabulate(paper.format_lines(), paper.header, disable_numparse=True)
        lines += ["", f"-------- {paper.title}", *shown.splitlines(), *paper.list_notes()]
    return "\n".join(lines) + "\n"


def to_markdown(report: Report) -> str:
    """Return a section per selection method, with notes on the incomplete cells of every table."""
    lines = ["# Results", "", f"{report.num_records:,} records."]
    for method, tables in report.group_by_method():
        lines += ["", f"## Model selection: {method.name}"]
        for table in tables:
            lines += ["", f"### {escape_markdown(table.title)}", "", format_pipes(table.header, mark_cells(table))]
            if notes := report.list_missing(table):
                lines += ["", f"{DAGGER} Incomplete, for want of:", "", *(f"- {escape_markdown(n)}" for n in notes)]
    for paper in report.published:
        lines += ["", f"## {paper.title}", "", format_pipes(paper.header, paper.format_lines())]
        lines += [line for note in paper.list_notes() for line in ("", note)]
    return "\n".join(lines) + "\n"


def mark_cells(table: Table) -> list[list[str]]:
    """Return the lines of a table as Markdown: the best bold, the second in italics, incomplete cells with a dagger."""
    ranks = table.rank_cells()

    def format_cell(i: int, j: int, cell: Cell) -> str:
        text = cell.format("±")
        text = {1: f"**{text}**", 2: f"*{text}*"}.get(ranks[i][j], text)
        return text + DAGGER if cell.missing else text

    return table.format_lines(format_cell)


def format_pipes(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the header and the first column are escaped."""
    cells = [[escape_markdown(text) if j == 0 else text for j, text in enumerate(line)] for line in lines]
    align = ["left", *["right"] * (len(header) - 1)]
    names = [escape_markdown(text) for text in header]
    return tabulate(cells, names, tablefmt="pipe", colalign=align, disable_numparse=True)


def escape_markdown(text: str) -> str:
    """Return text with a backslash before every character that has a meaning in Markdown."""
    return "".join("\\" + c if c in r"\`*_[]<>|#" else c for c in text)


def make_long_form(report: Report) -> pd.DataFrame:
    """Return one line per cell, accuracies in percent."""
    lines = []
    for table in report.tables:
        for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
            statistics = {"_".join(filter(None, (s.name, s.unit))): s.values[i] for s in table.statistics}
            for column, cell in zip(table.columns, cells, strict=True):
                place = {"selection": table.method.name, "dataset": table.title, "row": row, "column": column}
                lines.append({**place, **asdict(cell), **statistics})
    return pd.DataFrame(lines)


def to_csv(report: Report) -> str:
    """Return one line per cell: means and errors in percent, not rounded."""
    return str(make_long_form(report).to_csv(index=False))


def to_json(report: Report) -> str:
    """Return everything that the tables and their notes hold, and the origin of the numbers."""
    published = [{"title": t.title, "header": t.header, "rows": t.format_lines()} for t in report.published]
    content = {
        "records": report.num_records,
        "cells": json.loads(make_long_form(report).to_json(orient="records", double_precision=15)),
        "missing": describe_jobs(report.missing),
        "published": published,
        "notes": report.notes,
        "provenance": report.provenance,
    }
    return json.dumps(content, indent=1) + "\n"
