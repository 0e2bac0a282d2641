"""Download data sets into the folder where `train` looks for them, or check data sets that are there."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_hp.registry import DATASETS, UsageError
from domainbed_hp.scripts import run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.download", description=__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder for the data sets' folders: PACS, VLCS, ...")
    add("--datasets", nargs="+", default=[], metavar="NAME", help="data sets; with --check also folder:PATH")
    add("--mirror", default="", metavar="URL", help="URL of a folder that holds the archives; it is tried first")
    add("--archive", type=Path, nargs="+", default=[], metavar="PATH", help="archives that you downloaded by hand")
    add("--accept_counts", action="store_true", help="install even if the numbers of images match no known build")
    add("--check", action="store_true", help="download nothing; decode and count all images on disk, and list problems")
    add("--json", action="store_true", help="with --check: print the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    from domainbed_hp.datasets.download.check import check
    from domainbed_hp.datasets.download.download import download, match_archives
    from domainbed_hp.datasets.open import find_spec

    if not args.datasets:
        names = [name for name in DATASETS if find_spec(name).archives]
        raise UsageError(f"--datasets: got none, expected at least one name. Known: {', '.join(names)}")
    if args.json and not args.check:
        raise UsageError("--json: got it without --check; pass both")
    specs = [find_spec(name, args.data_dir) for name in dict.fromkeys(args.datasets)]
    for spec in specs:
        if spec.build is not None:
            raise UsageError(f"{spec.name} is made, not downloaded: train needs no --data_dir for it")
    failed = False
    if args.check:
        results: list[dict[str, Any]] = []
        for spec in specs:
            try:
                result = check(spec, args.data_dir)
            except UsageError as error:  # the others go on
                print(f"error: {error}", file=sys.stderr)
                results.append({"dataset": spec.name, "ok": False, "problems": [str(error)]})
                failed = True
                continue
            if not args.json:
                print("\n" * bool(results) + result.to_text(), flush=True)
            results.append(result.to_json())
        if args.json:
            print(json.dumps(results, indent=1))
        return 2 if failed else 0 if all(result["ok"] for result in results) else 1

    archives = match_archives(specs, args.archive)
    for spec in specs:
        try:
            download(spec, args.data_dir, args.mirror, archives, args.accept_counts)
        except UsageError as error:  # the others go on
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
