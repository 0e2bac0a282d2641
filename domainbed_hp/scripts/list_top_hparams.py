"""List the runs of one row of the tables, best first under every selection rule, with their hparams."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

from domainbed_hp import registry
from domainbed_hp.model_selection import load_selection_methods
from domainbed_hp.registry import UsageError
from domainbed_hp.reports.load import CollectedRuns
from domainbed_hp.scripts import run
from domainbed_hp.scripts.collect_results import add_input_flags, load_input


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.list_top_hparams", description=__doc__)
    add_input_flags(p, required=True)
    p.add_argument("--dataset", required=True, metavar="NAME", help="a data set of the tables")
    p.add_argument("--algorithm", required=True, metavar="ROW", help="a row of the tables: an algorithm, or a label")
    p.add_argument("--test_env", type=int, required=True, metavar="ENV", help="index of the test environment")
    p.add_argument("--top", type=int, metavar="N", help="list at most N runs of each trial (default: all)")
    args = p.parse_args(argv)
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top: got {args.top}, expected at least 1")

    collected = load_input(args)
    frame = collected.frame
    for kind, column, name in (("data set", "dataset", args.dataset), ("row", "row", args.algorithm)):
        if name not in set(frame[column]):
            raise registry.unknown_name(kind, name, sorted(set(frame[column])))
    records = frame[(frame["dataset"] == args.dataset) & (frame["row"] == args.algorithm)]
    envs = sorted({env for envs in records["test_envs"] for env in envs})
    if args.test_env not in envs:
        raise UsageError(f"--test_env: got {args.test_env}, known for {args.algorithm}: {envs}")

    for method in load_selection_methods():
        ranked = method.rank_runs(records)
        used = records[records["test_envs"].map(len).isin(method.num_test_envs)]
        print(f"Model selection: {method.name}")
        for trial, choices in ranked[ranked["test_env"] == args.test_env].groupby("trial_seed"):
            print(f"trial_seed: {trial}")
            for choice in choices.head(args.top).itertuples():
                print_choice(collected, used, choice)
        print()
    return 0


def print_choice(collected: CollectedRuns, records: pd.DataFrame, choice: Any) -> None:
    """Print accuracies and hparams of one line of `rank_runs`, and the folders of its runs."""
    print(f"\tval_acc: {100 * choice.val_acc:.1f}  test_acc: {100 * choice.test_acc:.1f}  step: {choice.step}")
    same = (records["trial_seed"] == choice.trial_seed) & (records["hparams_seed"] == choice.hparams_seed)
    runs = [collected.runs[i] for i in records.loc[same, "run"].unique()]
    runs = [run for run in runs if choice.test_env in run.args["test_envs"]]
    print("\t\thparams:")
    for name, value in sorted(runs[0].hparams.items()):
        print(f"\t\t\t{name}: {value}")
    print("\t\toutput_dirs:")
    for chosen_run in runs:
        print(f"\t\t\t{chosen_run.folder}")


if __name__ == "__main__":
    sys.exit(run(main))
