"""Print the results of a sweep: a table per data set and one of averages, under every selection rule.

The default format is that of DomainBed's collect_results.py. The text is printed to stdout, and written to a file in
--input_dir. Missing jobs and notes on the records (broken lines, runs of different protocols) are printed to stderr.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_hp.plugins import import_plugins
from domainbed_hp.registry import ALGORITHMS, DATASETS, SELECTION_RULES, UsageError, add_entry_points
from domainbed_hp.reports import latex, text_formats
from domainbed_hp.reports.load import CollectedRuns, load_runs
from domainbed_hp.reports.missing import describe_jobs, list_jobs
from domainbed_hp.reports.published import make_published_tables
from domainbed_hp.reports.report import Report, make_report
from domainbed_hp.reports.tables import list_environments
from domainbed_hp.scripts import run

if TYPE_CHECKING:
    from domainbed_hp.reports.compare import Comparison

FORMATS: dict[str, tuple[str, Callable[[Report], str], str]] = {
    "text": ("results.txt", text_formats.to_text, "print DomainBed's layout (the default)"),
    "latex": ("results.tex", latex.to_latex, "print a LaTeX document"),
    "latex_fragment": ("results_fragment.tex", latex.to_fragment, "print LaTeX tables for \\input in a document"),
    "markdown": ("results.md", text_formats.to_markdown, "print Markdown"),
    "csv": ("results.csv", text_formats.to_csv, "print one line per cell, not rounded"),
    "json": ("results.json", text_formats.to_json, "print JSON: cells, missing jobs, notes, versions"),
}
"""Flag -> name of the file in --input_dir, function that makes the text, help."""
PROVENANCE = "provenance.json"
MAX_LINES = 20
"""Number of lines about missing jobs that go to stderr."""


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.collect_results", description=__doc__)
    add_input_flags(p)
    formats = p.add_mutually_exclusive_group()
    for name, (file, _, text) in FORMATS.items():
        options: dict[str, Any] = {"dest": "format", "default": "text", "help": f"{text}; also written to {file}"}
        formats.add_argument(f"--{name}", action="store_const", const=name, **options)
    add = p.add_argument
    add("--html", type=Path, metavar="FILE", help="write an HTML page with tables, figures and missing jobs to FILE")
    text = (
        "add columns: params (number of trained parameters), step_time (median), memory (maximum, on a GPU), or the "
        "key of any number in the records, e.g. val_mmd: its mean over the records that the selection rule picks"
    )
    add("--columns", nargs="+", metavar="NAME", default=[], help=text)
    add("--with_published", action="store_true", help="add tables of results that papers report")
    text = "instead of tables, print the first row minus the second, paired by trial and environment"
    add("--compare", nargs=2, metavar="ROW", help=text)
    add("--missing", type=Path, metavar="FILE", help="write the missing jobs to FILE, for `sweep launch --jobs FILE`")
    add("--strict", action="store_true", help="fail if jobs or rows are missing, or if there are notes on the records")
    return p


def add_input_flags(p: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the flags of every script that reads a folder of runs: --input_dir and --import."""
    default = None if required else Path("results/quickstart")
    text = "folder that holds the runs, at any depth" + ("" if required else " (default: %(default)s)")
    p.add_argument("--input_dir", type=Path, required=required, default=default, metavar="DIR", help=text)
    text = "names of your own Python modules, which define data sets, algorithms or selection rules"
    p.add_argument("--import", dest="imports", nargs="+", metavar="MODULE", default=[], help=text)


def load_input(args: argparse.Namespace) -> CollectedRuns:
    """Register all plugins and load the runs of --input_dir; `UsageError` if there is none."""
    import_plugins(args.imports)
    for table, kind in ((ALGORITHMS, "algorithm"), (DATASETS, "dataset"), (SELECTION_RULES, "selection_rule")):
        add_entry_points(table, kind)
    collected = load_runs(args.input_dir)
    if not collected.runs:
        raise UsageError(
            f"nothing to collect: no results.jsonl with a record under {args.input_dir}. Launch a sweep first "
            "(python -m domainbed_hp.scripts.sweep launch; --help lists its flags) or name its folder with --input_dir"
        )
    return collected


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    collected = load_input(args)
    report = make_report(collected, args.columns)
    if args.with_published:
        report.published = make_published_tables(list_environments(collected.frame))
    if args.missing:
        write_file(args.missing, json.dumps(list_jobs(report.missing), indent=1) + "\n")
    print_notes([*report.notes, *report.absent_rows])
    print_missing(report, args.missing)
    if args.strict and (report.missing or report.absent_rows or collected.notes):
        raise UsageError(
            f"--strict: {len(report.missing)} jobs are missing, {len(report.absent_rows)} rows have no runs on a data "
            f"set, {len(collected.notes)} notes are on records: see above. No tables are printed. "
            "--missing FILE writes the jobs for `sweep launch --jobs FILE`"
        )

    comparisons = []
    if args.compare:
        from domainbed_hp.reports.compare import compare_rows  # scipy takes a second to import

        comparisons = compare_rows(collected.frame, *args.compare)
        print("\n\n".join(comparison.to_text() for comparison in comparisons))
    else:
        file, make_text, _ = FORMATS[args.format]
        text = make_text(report)
        print(text, end="")
        copies = {file: text, PROVENANCE: json.dumps(report.provenance, indent=1) + "\n"}
        for name, content in copies.items():
            try:
                write_file(args.input_dir / name, content)
            except UsageError as error:  # a read-only folder of runs can still be read
                print_notes([str(error)])
    if args.html:
        write_file(args.html, make_page(report, collected, str(args.input_dir), comparisons))
        print(f"page: {args.html}", file=sys.stderr)
    return 0


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_missing(report: Report, jobs_file: Path | None) -> None:
    """Print the missing jobs to stderr, and the command that launches them if they were written to a file."""
    lines = describe_jobs(report.missing)
    for line in lines[:MAX_LINES]:
        print(f"missing: {line}", file=sys.stderr)
    if lines[MAX_LINES:]:
        print(f"missing: and {len(lines) - MAX_LINES} lines more; --json lists them all", file=sys.stderr)
    if lines and jobs_file:
        command = f"python -m domainbed_hp.scripts.sweep launch --jobs {shlex.quote(str(jobs_file))}"
        print(f"To complete the tables: {command}", file=sys.stderr)


def make_page(report: Report, collected: CollectedRuns, title: str, comparisons: Sequence["Comparison"]) -> str:
    """Return the HTML page, with figures under the first selection rule; their notes are added to the report's."""
    from domainbed_hp.reports.figures import draw_figures  # matplotlib takes a second to import
    from domainbed_hp.reports.html import to_html

    notes: list[str] = []
    _, tables = next(report.group_by_method())
    figures = draw_figures(collected, tables, notes=notes)
    print_notes(notes)
    report.notes += notes
    return to_html(report, collected, title, figures, comparisons)


def write_file(path: Path, text: str) -> None:
    """Write a file; `UsageError` if that is impossible."""
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run(main))
