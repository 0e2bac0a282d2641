"""Draw figures of a sweep as PNG and PDF: accuracies, training curves, validation against target accuracy, gates."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.registry import SELECTION_RULES, UsageError, load
from domainbed_hp.reports.report import make_report
from domainbed_hp.scripts import run
from domainbed_hp.scripts.collect_results import add_input_flags, load_input, print_notes


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.plot", description=__doc__)
    add_input_flags(p)
    add = p.add_argument
    add("--output_dir", type=Path, metavar="DIR", help="folder of the figures (default: figures/ in --input_dir)")
    text = f"selection rule for accuracies and gates: {', '.join(SELECTION_RULES)} (default: %(default)s)"
    add("--selection", metavar="RULE", default="iid", help=text)
    text = "draw these numbers of the records by step, e.g. val_mmd, instead of the training loss"
    add("--curves", nargs="+", metavar="NAME", default=[], help=text)
    args = p.parse_args(argv)
    from domainbed_hp.reports.figures import draw_figures  # after argparse: matplotlib takes a second to import

    collected = load_input(args)
    method = load(SELECTION_RULES, "selection_rule", args.selection)
    tables = [table for table in make_report(collected).tables if table.method.key == method.key]
    notes: list[str] = []
    figures = draw_figures(collected, tables, args.curves, notes)
    if not figures:
        raise UsageError(f"nothing to draw: no cell of {args.input_dir} has a result by --selection {args.selection}")
    output_dir = args.output_dir or args.input_dir / "figures"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(output_dir / f"{name}.png", dpi=200)
            figure.savefig(output_dir / f"{name}.pdf")
            print(output_dir / f"{name}.png")
    except OSError as error:
        raise UsageError(f"{output_dir}: cannot be written to: {error.strerror}") from error
    print_notes(notes)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
