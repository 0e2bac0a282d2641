"""Download data sets to where `train` looks for them, or check those that are there."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_hp.registry import DATASETS, UsageError
from domainbed_hp.scripts import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.download", description=__doc__)
    p.add_argument("--data_dir", type=Path, required=True, help="folder that holds, or is to hold, PACS/, VLCS/, ...")
    p.add_argument(
        "--datasets", nargs="+", default=[], metavar="NAME", help="e.g. PACS VLCS; with --check also folder:PATH"
    )
    p.add_argument("--mirror", default="", metavar="URL", help="a server's folder with the archives; tried first")
    p.add_argument("--archive", type=Path, nargs="+", default=[], metavar="PATH", help="archives fetched by hand")
    p.add_argument("--accept_counts", action="store_true", help="install what has other numbers of images than known")
    p.add_argument("--check", action="store_true", help="download nothing; decode and compare every image there is")
    p.add_argument("--json", action="store_true", help="with --check: for machines")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from domainbed_hp.datasets.download.check import check
    from domainbed_hp.datasets.download.download import download, given
    from domainbed_hp.datasets.open import find_spec

    if not args.datasets:
        names = [name for name in DATASETS if find_spec(name).archives]
        raise UsageError(f"--datasets: name at least one. To be had: {', '.join(names)}")
    if args.json and not args.check:
        raise UsageError("--json: goes with --check")
    specs = [find_spec(name, args.data_dir) for name in dict.fromkeys(args.datasets)]
    for spec in specs:
        if spec.build is not None:
            raise UsageError(f"{spec.name} is made, not downloaded: train needs no --data_dir for it")
    failed = False
    if args.check:
        reports: list[dict[str, Any]] = []
        for spec in specs:
            try:
                report = check(spec, args.data_dir)
            except UsageError as error:  # the others go on
                print(f"error: {error}", file=sys.stderr)
                reports.append({"dataset": spec.name, "ok": False, "problems": [str(error)]})
                failed = True
                continue
            if not args.json:
                print("\n" * bool(reports) + report.text(), flush=True)
            reports.append(report.json())
        if args.json:
            print(json.dumps(reports, indent=1))
        return 2 if failed else 0 if all(report["ok"] for report in reports) else 1

    archives = given(specs, args.archive)
    for spec in specs:
        try:
            download(spec, args.data_dir, args.mirror, archives, args.accept_counts)
        except UsageError as error:  # the others go on
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
