"""Print the tables of a sweep: a table per dataset and one of averages, under each of DomainBed's selection methods.

Without a flag for another format stdout is what DomainBed's collector prints. What the tables cannot show (missing
jobs, broken lines, rows told apart) goes to stderr.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_hp.registry import UsageError
from domainbed_hp.reports import latex, load, published, report, tables, text_formats
from domainbed_hp.reports.load import Collected
from domainbed_hp.reports.missing import describe, launchable
from domainbed_hp.reports.report import Report
from domainbed_hp.scripts import run

if TYPE_CHECKING:
    from domainbed_hp.reports.compare import Comparison

FORMATS: dict[str, tuple[str, Callable[[Report], str], str]] = {
    "text": ("results.txt", text_formats.to_text, "DomainBed's layout (the default)"),
    "latex": ("results.tex", latex.to_latex, "a LaTeX document"),
    "latex_fragment": ("results_fragment.tex", latex.to_fragment, "LaTeX for \\input"),
    "markdown": ("results.md", text_formats.to_markdown, "Markdown"),
    "csv": ("results.csv", text_formats.to_csv, "one line per cell, unrounded"),
    "json": ("results.json", text_formats.to_json, "all that is known"),
}
"""Flag -> file in --input_dir, format, help."""
PROVENANCE = "provenance.json"
SHOWN = 20
"""Lines of missing jobs on stderr."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.collect_results", description=__doc__)
    p.add_argument("--input_dir", type=Path, default=Path("results/quickstart"), help="default: %(default)s")
    formats = p.add_mutually_exclusive_group()
    for name, (file, _, text) in FORMATS.items():
        formats.add_argument(
            f"--{name}", dest="format", action="store_const", const=name, default="text", help=f"{text}; also {file}"
        )
    p.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with tables, figures and what is missing, too"
    )
    p.add_argument("--columns", nargs="+", choices=list(tables.COSTS), default=[], help="what a row costs")
    p.add_argument("--with_published", action="store_true", help="numbers of papers, set apart")
    p.add_argument(
        "--compare", nargs=2, metavar="ROW", help="the first row minus the second, paired, in place of tables"
    )
    p.add_argument("--missing", type=Path, metavar="FILE", help="write the missing jobs for `sweep launch --jobs FILE`")
    p.add_argument("--strict", action="store_true", help="an error where a job is missing or records need an eye")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found = load.load(args.input_dir)
    if not found.runs:
        raise nothing(args.input_dir)
    made = report.make(found, args.columns)
    if args.with_published:
        made.published = published.beside(tables.environments(found.frame))
    if args.missing:
        write(args.missing, json.dumps(launchable(made.missing), indent=1) + "\n")
    tell(made, args.missing)
    if args.strict and (made.missing or made.no_runs or found.notes):
        raise UsageError(
            f"--strict: {len(made.missing)} jobs are missing, {len(made.no_runs)} rows have no runs on a data set, "
            f"{len(found.notes)} notes are on records: see above. Nothing is printed. "
            "--missing FILE writes the jobs for `sweep launch --jobs FILE`"
        )

    comparisons = []
    if args.compare:
        from domainbed_hp.reports.compare import compare  # scipy takes a second

        comparisons = compare(found.frame, *args.compare)
        print("\n\n".join(comparison.text() for comparison in comparisons))
    else:
        file, to, _ = FORMATS[args.format]
        text = to(made)
        print(text, end="")
        keep(args.input_dir / file, text)
        keep(args.input_dir / PROVENANCE, json.dumps(made.provenance, indent=1) + "\n")
    if args.html:
        write(args.html, page(made, found, str(args.input_dir), comparisons))
        print(f"page: {args.html}", file=sys.stderr)
    return 0


def nothing(input_dir: Path) -> UsageError:
    return UsageError(
        f"nothing to collect: no results.jsonl with a record under {input_dir}. Launch a sweep first "
        "(python -m domainbed_hp.scripts.sweep launch; --help lists its flags) or name its folder with --input_dir"
    )


def tell(made: Report, written: Path | None) -> None:
    """What the tables do not show, on stderr."""
    for note in [*made.notes, *made.no_runs]:
        print(f"note: {note}", file=sys.stderr)
    lines = describe(made.missing)
    for line in lines[:SHOWN]:
        print(f"missing: {line}", file=sys.stderr)
    if lines[SHOWN:]:
        print(f"missing: and {len(lines) - SHOWN} lines more; --json lists them all", file=sys.stderr)
    if lines and written:
        command = f"python -m domainbed_hp.scripts.sweep launch --jobs {shlex.quote(str(written))}"
        print(f"To complete the tables: {command}", file=sys.stderr)


def page(made: Report, found: Collected, title: str, comparisons: Sequence["Comparison"]) -> str:
    from domainbed_hp.model_selection import IIDAccuracy
    from domainbed_hp.reports.figures import all_figures  # matplotlib takes a second
    from domainbed_hp.reports.html import to_html

    shown = [table for table in made.tables if table.method is IIDAccuracy]
    return to_html(made, found, title, all_figures(found, shown), comparisons)


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def keep(path: Path, text: str) -> None:
    """Leave beside the runs what is printed; a folder that cannot be written to is no reason to stop."""
    try:
        path.write_text(text)
    except OSError as error:
        print(f"note: {path} is not written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
