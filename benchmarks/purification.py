"""Effect of each part of head purification, from the records of a sweep such as sweeps/shapes.toml.

    python benchmarks/purification.py results/shapes > results/shapes/paired.txt

How: accuracy on the held-out domain under training-domain validation, mean over environments. Differences to the method
are paired by trial, with standard errors over trials (ddof = 1). Below the table, from each run's last record: the MMD
of the source domains' validation images with and without the MMD in training, and how far the gates moved.

Runtime: 2 seconds.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from domainbed_hp.model_selection import IIDAccuracy
from domainbed_hp.reports import load, tables

METHOD, CONTROL = "HeadPurification", "HeadPurification, no MMD"


def format_mean(values: pd.Series) -> str:
    """Return mean and standard error, in points."""
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_dir", type=Path, help="folder of a sweep with all rows of sweeps/shapes.toml")
    frame = load.load_runs(parser.parse_args().input_dir).frame
    chosen = IIDAccuracy.select(frame)
    by_trial = chosen.pivot_table(index="trial_seed", columns="row", values="test_acc", aggfunc="mean")
    by_env = chosen.pivot_table(index="test_env", columns="row", values="test_acc", aggfunc="mean")
    lines = []
    for row in tables.order_rows(frame):
        gain = by_trial[METHOD] - by_trial[row]
        envs = [f"{100 * by_env[row][env]:.1f}" for env in by_env.index]
        lines.append([row, *envs, format_mean(by_trial[row]), "" if row == METHOD else format_mean(gain)])
    headers = ["", *(f"env {env}" for env in by_env.index), "average", f"{METHOD} minus it"]
    print(tabulate(lines, headers, disable_numparse=True, tablefmt="github"))
    print(f"\n{len(by_trial)} trials")

    last = frame.sort_values("step", kind="stable").groupby(["row", "trial_seed", "test_envs"]).last()
    ratios = last.loc[METHOD, "val_mmd"] / last.loc[CONTROL, "val_mmd"]
    moved = last.loc[METHOD, "gate_shift"]
    print(f"validation MMD, with over without: lower in {sum(r < 1 for r in ratios)} of {len(ratios)} runs, ", end="")
    print(f"median ratio {np.median(ratios):.3f}, largest {max(ratios):.3f}")
    print(f"largest move of a gate: at least {min(moved):.2f} in every run, median {np.median(moved):.2f}")


if __name__ == "__main__":
    main()
