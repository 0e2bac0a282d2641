"""Time of whole leave-one-out runs, start to `done`, with and without `--eval fast`.

    python benchmarks/run.py DATA_DIR [--case mini|vit]

How: DATA_DIR holds PACS/. `mini` is the package's small CLIP at 64 pixels on 256 images of each environment, `vit` is
ViT-B/16 with random weights (speed is the same) on 32. PACS's own 5,001 steps have 18 records, so that about one image
is scored for each that is trained on; a run here has two records, at its ends, and the steps that hold this proportion.
On the CPU one pinned core, images prepared before. The variants take turns round by round in one process, and each
round gives a ratio; before, each runs two steps to warm up.

Runtime on one core: `mini` 5 minutes, `vit` 45 minutes. All of PACS, hours: `--images 0 --records 18`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import format_spread, interleave, link_images, silence, use_one_thread
from tabulate import tabulate

from domainbed_hp.run_args import RunArgs
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.training.loop import train
from domainbed_hp.training.setup import find_device, set_up_run

CASES = {
    "mini": ({"clip_model": "mini", "clip_pretrained": "shapes"}, 256),
    "vit": ({"clip_model": "ViT-B-16-quickgelu", "clip_pretrained": "random"}, 32),
}
"""Hparams, and images of each environment."""


def prepare_images(args: RunArgs) -> None:
    """Prepare the images that a run reads, as its tower wants them."""
    with silence():
        preprocess = set_up_run(args).preprocess
        shape = ["--image_size", str(preprocess.size), "--resize", preprocess.resize]
        shape += ["--interpolation", preprocess.interpolation, "--encoding", "raw"]
        prepare(["--data_dir", str(args.data_dir), "--dataset", args.dataset, *shape])
        assert set_up_run(args).dataset.source == "prepared, raw"


def time_run(args: RunArgs) -> float:
    """Return the seconds of a run in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder, silence():
        start = time.perf_counter()
        train(replace(args, output_dir=folder))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that holds PACS/")
    parser.add_argument("--case", choices=CASES, default="mini", help="the CLIP and its number of images")
    parser.add_argument("--algorithm", default="HeadPurification", help="the algorithm to train")
    parser.add_argument("--images", type=int, help="images of each environment, 0: all; default: the case's")
    parser.add_argument("--batch", type=int, default=12, help="images of each environment in a step")
    parser.add_argument("--records", type=int, default=2, help="records of a run, at least 2")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to measure")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of products")
    args = parser.parse_args()
    machine, (hparams, images) = use_one_thread(find_device(args.device)), CASES[args.case]
    with tempfile.TemporaryDirectory() as folder:
        link_images(args.data_dir, Path(folder), images if args.images is None else args.images)
        count = len(list(Path(folder).glob("PACS/*/*/*")))
        steps = max(args.records, round(args.records * count / (3 * args.batch)))
        usual = RunArgs(
            output_dir="set for each run",
            data_dir=folder,
            dataset="PACS",
            algorithm=args.algorithm,
            hparams=json.dumps(hparams | {"batch_size": args.batch}),
            steps=steps,
            checkpoint_freq=-(-(steps - 1) // (args.records - 1)),
            device=args.device,
            precision=args.precision,
        )
        start = time.perf_counter()
        prepare_images(usual)
        print(f"prepared in {time.perf_counter() - start:.1f} s")
        runs = {"--eval full": usual, "--eval fast": replace(usual, eval="fast")}
        for run in runs.values():
            time_run(replace(run, steps=2, eval_images=2))
        seconds = interleave({name: lambda _, run=run: time_run(run) for name, run in runs.items()}, args.rounds)
    print(f"{args.algorithm}, {args.case}, {machine}, {args.precision}: {count:,} images, {steps:,} steps, ", end="")
    print(f"{args.records} records, {args.rounds} rounds")
    full = np.array(seconds["--eval full"])
    rows = [[name, f"{np.median(times):.2f}", format_spread(full / np.array(times))] for name, times in seconds.items()]
    print(tabulate(rows, ["", "seconds", "times as fast (5 to 95 % of rounds)"], disable_numparse=True))


if __name__ == "__main__":
    main()
