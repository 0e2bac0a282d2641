"""What a whole leave-one-out run costs, start to `done`, part by part: `--eval full` against `--eval fast`.

    python benchmarks/run.py DATA_DIR [--case mini|vit]

DATA_DIR holds PACS/. `mini` is the package's small CLIP at 64 pixels on 256 images of each environment, `vit` ViT-B/16
with random weights (speed is the same) on 32. Where PACS's own 5,001 steps have 18 records, so that about one image is
scored for each that is trained on, a run here has two records, at its ends, and the steps that keep this proportion.
All of it, hours on a CPU: `--images 0 --records 18`.

On the CPU one pinned core. Variants take turns round by round in one process that keeps nothing between runs, and each
round gives a ratio; before, each runs two steps to warm up. Both read prepared data, whose making is timed apart.

load        what the loop waits for its batches (on a GPU, threads load ahead)
augment     `Batch.to`: to the device, and there crops and flips
forward     `update` but for what is next
backward    gradients and the optimizer
evaluate    scoring every split, its loading included
write       the record, the state to resume from, the model
start       opening data and building the model

Timers wait for a GPU at their borders, so that nothing runs ahead on it and nothing is captured: `--whole` measures
without them, as `train` runs.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from clock import PARTS, Clock, timers
from common import one_thread, prepare_for, quiet, spread, subset, turns
from tabulate import tabulate

from domainbed_hp.algorithms import get_algorithm_class
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.loop import train
from domainbed_hp.training.setup import find_device

CASES = {
    "mini": ({"clip_model": "mini", "clip_pretrained": "shapes"}, 256),
    "vit": ({"clip_model": "ViT-B-16-quickgelu", "clip_pretrained": "random"}, 32),
}
"""Hparams, and images of each environment."""


def seconds(args: RunArgs, device: torch.device, whole: bool) -> dict[str, float]:
    """Of each part of a run in a fresh folder; `whole`: all of it is `rest`."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder, quiet():
        with contextlib.nullcontext() if whole else timers(clock, get_algorithm_class(args.algorithm)):
            train(replace(args, output_dir=folder))
        clock.book()
    return clock.seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--case", choices=CASES, default="mini")
    parser.add_argument("--algorithm", default="HeadPurification")
    parser.add_argument("--images", type=int, help="of each environment, 0: all; default: the case's")
    parser.add_argument("--batch", type=int, default=12, help="images of each environment in a step")
    parser.add_argument("--records", type=int, default=2, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--whole", action="store_true", help="no parts, and so no timers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = find_device(args.device)
    machine, (hparams, images) = one_thread(device), CASES[args.case]
    with tempfile.TemporaryDirectory() as folder:
        subset(args.data_dir, Path(folder), images if args.images is None else args.images)
        count = len(list(Path(folder).glob("PACS/*/*/*")))
        steps = max(args.records, round(args.records * count / (3 * args.batch)))
        full = RunArgs(
            *("a fresh one", folder, "PACS", args.algorithm),
            hparams=json.dumps(hparams | {"batch_size": args.batch}),
            steps=steps,
            checkpoint_freq=-(-(steps - 1) // (args.records - 1)),
            device=args.device,
            precision=args.precision,
            compile="auto" if args.whole else "off",
        )
        start = time.perf_counter()
        prepare_for(full)
        print(f"prepared in {time.perf_counter() - start:.1f} s")
        runs = {
            "full": full,
            "fast": replace(full, eval="fast"),
        }
        for run in runs.values():
            seconds(replace(run, steps=2, eval_images=2), device, args.whole)
        variants = {name: lambda _, run=run: seconds(run, device, args.whole) for name, run in runs.items()}
        taken = turns(variants, args.rounds)
    print(f"{args.algorithm}, {args.case}, {machine}, {args.precision}: {count:,} images, {steps:,} steps, ", end="")
    print(f"{args.records} records, {args.rounds} rounds; seconds")
    parts = () if args.whole else PARTS
    totals = {name: np.array([sum(run.values()) for run in times]) for name, times in taken.items()}
    rows = []
    for name, times in taken.items():
        split = [f"{np.median([run[part] for run in times]):.2f}" for part in parts]
        rows.append([name, *split, f"{np.median(totals[name]):.2f}", spread(totals["full"] / totals[name])])
    headers = ["", *parts, "whole run", "times full (5 to 95 % of rounds)"]
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
