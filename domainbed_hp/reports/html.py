"""The report as one HTML file that loads nothing from the network or from other files."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence

import jinja2
from matplotlib.figure import Figure

from domainbed_hp import run_dir
from domainbed_hp.reports.compare import Comparison
from domainbed_hp.reports.load import CollectedRuns
from domainbed_hp.reports.missing import describe_jobs
from domainbed_hp.reports.report import Report
from domainbed_hp.reports.tables import Cell, Table
from domainbed_hp.run_dir import State

DPI = 110


def to_html(
    report: Report,
    collected: CollectedRuns,
    title: str,
    figures: Mapping[str, Figure],
    comparisons: Sequence[Comparison] = (),
) -> str:
    """Return the page: tables to sort and filter, figures, missing jobs, failed jobs, configuration and versions."""
    loader = jinja2.PackageLoader("domainbed_hp", "reports")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    optional = {"comparison": comparisons, "published": report.published, "figures": figures}
    return environment.get_template("page.html").render(
        title=title,
        report=report,
        methods=list(report.group_by_method()),
        list_lines=list_lines,
        comparisons=comparisons,
        figures={name: encode_png(figure) for name, figure in figures.items()},
        missing=describe_jobs(report.missing),
        failed=list(find_failed_jobs(collected)),
        sections=[*(name for name, content in optional.items() if content), "missing", "failed", "provenance"],
    )


def list_lines(table: Table) -> Iterator[tuple[str, Sequence[Cell], list[int], list[tuple[str, float | None]]]]:
    """Yield (row, cells, ranks of the cells, (text, value) of each statistic) of a table."""
    statistics = [list(zip(statistic.format(), statistic.values, strict=True)) for statistic in table.statistics]
    ranks = table.rank_cells()
    for i, (row, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
        yield row, cells, ranks[i], [pairs[i] for pairs in statistics]


def find_failed_jobs(collected: CollectedRuns) -> Iterator[tuple[str, str]]:
    """Yield (description of a job, last line of its error)."""
    for plan in collected.planned:
        if not plan.done and plan.job.state is State.FAILED:
            yield plan.job.summary, run_dir.read_failure(plan.job.folder)


def encode_png(figure: Figure) -> str:
    """Return a figure as PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode()
