"""Print the tables of a sweep: a table per dataset and one of averages, under each of DomainBed's selection methods.

What the tables cannot show (missing trials, broken lines) goes to stderr; stdout is what DomainBed's collector prints.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp import model_selection, records, tables
from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run


def read_plan(input_dir: Path) -> tuple[list[str], dict[str, set[int]], int]:
    """Of sweep.json, if `sweep launch` wrote one: rows in order, dataset -> trial seeds, number of unfinished jobs."""
    path = input_dir / "sweep.json"
    if not path.exists():
        return [], {}, 0
    try:
        plan = json.loads(path.read_text())
        rows = [records.row_label(row) for row in plan.get("rows", [])]
        jobs = plan.get("jobs", [])
        trials: dict[str, set[int]] = {}
        for job in jobs:
            trials.setdefault(job["args"]["dataset"], set()).add(job["args"]["trial_seed"])
        return rows, trials, sum(not (input_dir / job["folder"] / "done").exists() for job in jobs)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a sweep file ({error!r}); delete it and launch again") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.collect_results", description=__doc__)
    parser.add_argument("--input_dir", type=Path, default=Path("results/quickstart"), help="default: %(default)s")
    parser.add_argument("--latex", action="store_true", help="a LaTeX document in place of text")
    args = parser.parse_args(argv)

    with warnings.catch_warnings(record=True) as torn:
        warnings.simplefilter("always")
        found = records.load(args.input_dir)
    notes = [str(warning.message) for warning in torn]
    if not found:
        raise UsageError(
            f"nothing to collect: no results.jsonl with a record under {args.input_dir}. Launch a sweep first "
            "(python -m domainbed_hp.scripts.sweep launch; --help lists its flags) or name its folder with --input_dir"
        )
    frame = records.frame(found)
    records.check_protocol(found)

    rows, trials, unfinished = read_plan(args.input_dir)
    built = [table for method in model_selection.METHODS for table in tables.build(frame, method, rows)]
    notes += tables.gaps(built, frame, trials)
    if unfinished:
        notes.append(f"{unfinished} jobs of this sweep are not done; what they have recorded so far is counted")
    text = (tables.to_latex if args.latex else tables.to_text)(built, len(found))
    print(text, end="")

    path = args.input_dir / ("results.tex" if args.latex else "results.txt")
    try:
        path.write_text(text)
    except OSError as error:
        notes.append(f"{path} is not written: {error.strerror}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
