"""What each part of head purification does, from the records of a sweep such as sweeps/shapes.toml.

    python benchmarks/purification.py results/shapes

Accuracy on the held-out domain under training-domain validation, mean over environments. Differences to the method
are paired by trial; standard errors over trials, ddof = 1. Then the source domains' MMD on validation images (scales
of the frozen model), last checkpoint, with and without the MMD in training, and how far the gates moved.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from domainbed_hp.model_selection import IIDAccuracy
from domainbed_hp.reports import load, tables

METHOD, CONTROL = "HeadPurification", "HeadPurification, no MMD"


def mean_err(values: pd.Series) -> str:
    """Mean and standard error, in points."""
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(folder: Path) -> None:
    found = load.load_runs(folder)
    frame = found.frame
    chosen = IIDAccuracy.select(frame)
    by_trial = chosen.pivot_table(index="trial_seed", columns="row", values="test_acc", aggfunc="mean")
    by_env = chosen.pivot_table(index="test_env", columns="row", values="test_acc", aggfunc="mean")
    lines = []
    for row in tables.order_rows(frame):
        gain = by_trial[METHOD] - by_trial[row]
        envs = [f"{100 * by_env[row][env]:.1f}" for env in by_env.index]
        lines.append([row, *envs, mean_err(by_trial[row]), "" if row == METHOD else mean_err(gain)])
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
    main(Path(sys.argv[1]))
