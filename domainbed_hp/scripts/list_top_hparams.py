"""List the runs of one algorithm by how each of DomainBed's selection methods ranks them, with their hparams."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from domainbed_hp import registry
from domainbed_hp.model_selection import METHODS, LeaveOneOut
from domainbed_hp.registry import UsageError
from domainbed_hp.reports import load
from domainbed_hp.reports.load import Collected
from domainbed_hp.scripts import run
from domainbed_hp.scripts.collect_results import nothing


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.list_top_hparams", description=__doc__)
    p.add_argument("--input_dir", type=Path, required=True)
    p.add_argument("--dataset", required=True)
    p.add_argument("--algorithm", required=True, help="a row of the tables: an algorithm, or a label")
    p.add_argument("--test_env", type=int, required=True)
    p.add_argument("--top", type=int, help="runs of each trial (default: all)")
    args = p.parse_args(argv)
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top: got {args.top}, expected at least 1")

    found = load.load(args.input_dir)
    if not found.runs:
        raise nothing(args.input_dir)
    frame = found.frame
    for kind, column, name in (("data set", "dataset", args.dataset), ("row", "row", args.algorithm)):
        if name not in set(frame[column]):
            raise registry.unknown_name(kind, name, sorted(set(frame[column])))
    mine = frame[(frame["dataset"] == args.dataset) & (frame["row"] == args.algorithm)]
    envs = sorted({env for envs in mine["test_envs"] for env in envs})
    if args.test_env not in envs:
        raise UsageError(f"--test_env {args.test_env}: {args.algorithm} was tested on the environments {envs}")

    for method in METHODS:
        ranked = method.ranked(mine)
        print(f"Model selection: {method.name}")
        for trial, runs in ranked[ranked["test_env"] == args.test_env].groupby("trial_seed"):
            print(f"trial_seed: {trial}")
            for choice in runs.head(args.top).itertuples():
                show(found, mine[mine["test_envs"].map(len) <= (2 if method is LeaveOneOut else 1)], choice)
        print()
    return 0


def show(found: Collected, mine: pd.DataFrame, choice: Any) -> None:
    """One run: validation and test accuracy, hparams, and the folders of the runs that they come from."""
    print(f"\tval_acc: {100 * choice.val_acc:.1f}  test_acc: {100 * choice.test_acc:.1f}  step: {choice.step}")
    same = (mine["trial_seed"] == choice.trial_seed) & (mine["hparams_seed"] == choice.hparams_seed)
    runs = [found.runs[i] for i in mine.loc[same, "run"].unique()]
    runs = [run for run in runs if choice.test_env in run.args["test_envs"]]
    print("\t\thparams:")
    for name, value in sorted(runs[0].hparams.items()):
        print(f"\t\t\t{name}: {value}")
    print("\t\toutput_dirs:")
    for each in runs:
        print(f"\t\t\t{each.folder}")


if __name__ == "__main__":
    sys.exit(run(main))
