"""The report as one HTML file that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence

import jinja2
from matplotlib.figure import Figure

from domainbed_hp import run_dir
from domainbed_hp.reports.compare import Comparison
from domainbed_hp.reports.load import Collected
from domainbed_hp.reports.missing import describe
from domainbed_hp.reports.report import Report
from domainbed_hp.reports.tables import Cell, Table
from domainbed_hp.run_dir import State

DPI = 110


def to_html(
    report: Report,
    collected: Collected,
    title: str,
    figures: Mapping[str, Figure],
    comparisons: Sequence[Comparison] = (),
) -> str:
    """Tables that can be sorted and filtered, figures, what is missing, failed jobs, configuration and versions."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("domainbed_hp", "reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    sections = {
        "comparison": bool(comparisons),
        "published": bool(report.published),
        "figures": bool(figures),
        "missing": True,
        "failed": True,
        "provenance": True,
    }
    return environment.get_template("page.html").render(
        title=title,
        report=report,
        methods=list(report.by_method()),
        lines=lines,
        comparisons=comparisons,
        figures={name: png(figure) for name, figure in figures.items()},
        missing=describe(report.missing),
        failed=list(failed(collected)),
        sections=[(name, name) for name, there in sections.items() if there],
    )


def lines(table: Table) -> Iterator[tuple[str, Sequence[Cell], list[int], list[tuple[str, float | None]]]]:
    """(row, cells, their ranks, (text, value) of its costs)."""
    costs = [list(zip(cost.format(), cost.values, strict=True)) for cost in table.costs]
    ranks = table.ranks()
    for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
        yield row, cells, ranks[i], [cost[i] for cost in costs]


def failed(collected: Collected) -> Iterator[tuple[str, str]]:
    """(job, last line of its error)."""
    for planned in collected.planned:
        if not planned.done and planned.job.state is State.FAILED:
            yield planned.job.describe(State.INCOMPLETE).partition(": ")[2], run_dir.read_failure(planned.job.folder)


def png(figure: Figure) -> str:
    """A figure in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode()
