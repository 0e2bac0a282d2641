"""Draw what a sweep recorded: accuracy, training curves, whether selection works, gates. PNG and PDF of each figure."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.model_selection import METHODS
from domainbed_hp.registry import UsageError
from domainbed_hp.reports import load, report
from domainbed_hp.scripts import run
from domainbed_hp.scripts.collect_results import nothing

SELECTION = dict(zip(("iid", "leave_one_out", "oracle"), METHODS, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.plot", description=__doc__)
    p.add_argument("--input_dir", type=Path, default=Path("results/quickstart"), help="default: %(default)s")
    p.add_argument("--output_dir", type=Path, help="default: figures/ in --input_dir")
    p.add_argument(
        "--selection", choices=list(SELECTION), default="iid", help="of the accuracies (default %(default)s)"
    )
    args = p.parse_args(argv)
    from domainbed_hp.reports import figures  # after argparse: matplotlib takes a second

    found = load.load(args.input_dir)
    if not found.runs:
        raise nothing(args.input_dir)
    tables = [table for table in report.make(found).tables if table.method is SELECTION[args.selection]]
    drawn = figures.all_figures(found, tables)
    if not drawn:
        raise UsageError(
            f"nothing to draw: under --selection {args.selection} no cell of {args.input_dir} has a result"
        )
    output_dir = args.output_dir or args.input_dir / "figures"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(output_dir / f"{name}.png", dpi=200)
            figure.savefig(output_dir / f"{name}.pdf")
            print(output_dir / f"{name}.png")
    except OSError as error:
        raise UsageError(f"{output_dir}: cannot be written to: {error.strerror}") from error
    if not any("-gates-" in name for name in drawn):
        print("note: no gates to draw: no selected run kept a model with gates (--skip_model_save?)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
