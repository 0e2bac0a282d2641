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

from domainbed_hp import records, tables
from domainbed_hp.model_selection import IIDAccuracy

METHOD, CONTROL = "HeadPurification", "HeadPurification, no MMD"


def mean_err(values: pd.Series) -> str:
    """Mean and standard error, in points."""
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(folder: Path) -> None:
    found = records.load(folder)
    frame = records.frame(found)
    chosen = IIDAccuracy.select(frame)
    by_trial = chosen.pivot_table(index="trial_seed", columns="row", values="test_acc", aggfunc="mean")
    by_env = chosen.pivot_table(index="test_env", columns="row", values="test_acc", aggfunc="mean")
    lines = []
    for row in tables.row_order(frame):
        gain = by_trial[METHOD] - by_trial[row]
        envs = [f"{100 * by_env[row][env]:.1f}" for env in by_env.index]
        lines.append([row, *envs, mean_err(by_trial[row]), "" if row == METHOD else mean_err(gain)])
    headers = ["", *(f"env {env}" for env in by_env.index), "average", f"{METHOD} minus it"]
    print(tabulate(lines, headers, disable_numparse=True, tablefmt="github"))
    print(f"\n{len(by_trial)} trials")

    last = {}
    for record in sorted(found, key=lambda r: r["step"]):
        args = record["args"]
        last[records.row_label(args), args["trial_seed"], args["test_envs"][0]] = record
    keys = [key[1:] for key in last if key[0] == METHOD]
    ratios = [last[METHOD, *k]["val_mmd"] / last[CONTROL, *k]["val_mmd"] for k in keys]
    moved = [last[METHOD, *k]["gate_shift"] for k in keys]
    print(f"validation MMD, with over without: lower in {sum(r < 1 for r in ratios)} of {len(ratios)} runs, ", end="")
    print(f"median ratio {np.median(ratios):.3f}, largest {max(ratios):.3f}")
    print(f"largest move of a gate: at least {min(moved):.2f} in every run, median {np.median(moved):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
