"""Whether the loader keeps up with a GPU: training on images from disk against training on a batch that is there.

    python benchmarks/busy.py DATA_DIR [--steps 200]

DATA_DIR holds PACS/, prepared first in a temporary folder. HeadPurification on ViT-B/16 with random weights in bf16,
8 loader threads on 8 cores, crops and flips on the GPU. The two take turns. `ratio` of their speeds: 1 where loading
and augmentation cost nothing. `busy`: the share of time in which some kernel runs, as the driver counts it (NVML).
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import prepare_for, spread, subset, synchronise, turns
from tabulate import tabulate

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.datasets.prefetch import Workers
from domainbed_hp.planning import RunArgs, plan
from domainbed_hp.speed import speed_up
from domainbed_hp.training import untrained

CORES = 8


class Busy:
    """Samples how busy the GPU is, in a thread, while it is entered."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, [0]

    def __enter__(self) -> "Busy":
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.stop.wait(0.1):
            if self.device.type == "cuda":
                self.samples.append(torch.cuda.utilization(self.device))

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


class Training:
    """HeadPurification on PACS, prepared in `folder`."""

    def __init__(self, folder: str, batch: int, options: argparse.Namespace) -> None:
        hparams = json.dumps({"clip_model": options.model, "clip_pretrained": "random", "batch_size": batch})
        args = RunArgs("not written", folder, "PACS", hparams=hparams, device=options.device, precision="bf16")
        prepare_for(args)
        self.run = plan(args)
        self.batches, self.algorithm = self.run.batches(), untrained(self.run.recipe, 0).to(self.run.device)
        speed_up(self.algorithm, self.run.device, options.compile, self.run.steps)
        self.there = next(self.loaded(range(1)))

    def loaded(self, steps: range) -> Iterator[list[Minibatch]]:
        """The minibatches of these steps, from disk."""
        with Workers(CORES) as workers:
            for ours in workers.map(self.batches.__getitem__, steps):
                yield [each.to(self.run.device, self.run.pixels) for each in ours]

    def measure(self, minibatches: Iterable[list[Minibatch]]) -> tuple[float, float]:
        """Seconds that training on them takes, and how busy the GPU is, in percent."""
        device = self.run.device
        synchronise(device)
        start = time.perf_counter()
        with Busy(device) as busy, torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            for each in minibatches:
                self.algorithm.update(each)
            synchronise(device)
        return time.perf_counter() - start, statistics.median(busy.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[12, 32], help="images of each environment in a step")
    parser.add_argument("--steps", type=int, default=200, help="of each way a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="open_clip model name, or mini")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--compile", default="on", choices=("auto", "on", "off"))
    args = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subset(args.data_dir, Path(folder), 0)
        for batch in args.batch:
            training = Training(folder, batch, args)
            training.measure([training.there] * 5)
            ways = {
                "there": lambda _: training.measure([training.there] * args.steps),  # noqa: B023
                "loaded": lambda r: training.measure(training.loaded(range(r * args.steps, (r + 1) * args.steps))),  # noqa: B023
            }
            times = turns(ways, args.rounds)
            (there, _), (loaded, share) = np.array(times["there"]).T, np.array(times["loaded"]).T
            speeds = [f"{3 * batch * args.steps / np.median(each):,.0f}" for each in (there, loaded)]
            rows.append([3 * batch, *speeds, spread(there / loaded), f"{np.median(share):.0f} %"])
    print(
        args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        f"{CORES} cores, --compile {args.compile}",
    )
    headers = ["images a step", "images/s, there", "images/s, loaded", "ratio", "busy"]
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
