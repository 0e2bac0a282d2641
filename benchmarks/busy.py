"""Whether the loader keeps up with a GPU: training on images from disk against training on a batch that is there.

    python benchmarks/busy.py DATA_DIR [--steps 500]

DATA_DIR holds PACS/, of which some images are prepared first in a temporary folder. HeadPurification on ViT-B/16 with
random weights in bf16, 8 loader threads on 8 cores, crops and flips on the GPU. The two take turns. `ratio` of their
speeds: 1 where loading and augmentation cost nothing. `busy`: the share of time in which some kernel runs, as the
driver counts it (nvidia-smi). Each size of batch is a line as soon as it is measured.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import prepare_for, spread, subset, synchronise, turns

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.cuda_graph import speed_up_training
from domainbed_hp.training.model_io import build_algorithm
from domainbed_hp.training.setup import set_up_run

CORES = 8


class Busy:
    """Asks the driver five times a second how busy the GPU is, while it is entered; `percent` is the median answer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.percent = device, math.nan

    def __enter__(self) -> "Busy":
        if self.device.type == "cuda":
            gpu = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            ask = f"nvidia-smi -i {gpu} --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 200"
            self.process = subprocess.Popen(ask.split(), stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.process.terminate()
            answers = [line for line in self.process.communicate()[0].split() if line.isdigit()]
            self.percent = statistics.median(map(int, answers)) if answers else math.nan


class Training:
    """HeadPurification on PACS, prepared in `folder`."""

    def __init__(self, folder: str, batch: int, options: argparse.Namespace) -> None:
        hparams = json.dumps({"clip_model": options.model, "clip_pretrained": "random", "batch_size": batch})
        args = RunArgs("not written", folder, "PACS", hparams=hparams, device=options.device, precision="bf16")
        prepare_for(args)  # at the second size of batch it is there
        self.run = set_up_run(args)
        self.batches = self.run.make_train_loader()
        self.algorithm = build_algorithm(self.run.model_spec, 0).to(self.run.device)
        speed_up_training(self.algorithm, self.run.device, options.compile, self.run.steps)
        self.there = next(self.loaded(range(1)))

    def loaded(self, steps: range) -> Iterator[list[Minibatch]]:
        """The minibatches of these steps, from disk."""
        with ThreadPool(CORES) as workers:
            for ours in workers.map(self.batches.__getitem__, steps):
                yield [each.to(self.run.device, self.run.preprocess) for each in ours]

    def measure(self, minibatches: Iterable[list[Minibatch]]) -> tuple[float, float]:
        """Seconds that training on them takes, and how busy the GPU is, in percent."""
        device = self.run.device
        synchronise(device)
        with Busy(device) as busy, torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            start = time.perf_counter()
            for each in minibatches:
                self.algorithm.update(each)
            synchronise(device)
            seconds = time.perf_counter() - start
        return seconds, busy.percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, default=500, help="of each environment, 0: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[12, 32], help="images of each environment in a step")
    parser.add_argument("--steps", type=int, default=500, help="of each way a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="open_clip model name, or mini")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="as `train`")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    name = args.device if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {len(cores)} cores, --compile {args.compile}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subset(args.data_dir, Path(folder), args.images)
        for batch in args.batch:
            print(f"{3 * batch} images a step: {compare(folder, batch, args)}", flush=True)


def compare(folder: str, batch: int, args: argparse.Namespace) -> str:
    """The two ways side by side."""
    training = Training(folder, batch, args)
    training.measure([training.there] * 5)  # compiles and captures
    ways = {
        "there": lambda _: training.measure([training.there] * args.steps),
        "loaded": lambda r: training.measure(training.loaded(range(r * args.steps, (r + 1) * args.steps))),
    }
    times = turns(ways, args.rounds)
    (there, _), (loaded, busy) = np.array(times["there"]).T, np.array(times["loaded"]).T
    images = 3 * batch * args.steps
    speeds = f"{images / np.median(there):,.0f} images/s there, {images / np.median(loaded):,.0f} loaded"
    return f"{speeds}, ratio {spread(there / loaded)}, busy {np.median(busy):.0f} %"


if __name__ == "__main__":
    main()
