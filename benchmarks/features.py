"""How much faster a frozen tower trains on its cached features than on images: steps per second, one against the other.

    python benchmarks/features.py DATA_DIR

DATA_DIR holds PACS/, of which --images a environment are taken. ViT-B/16 with random weights (speed is the same), one
thread; variants take turns round by round in one process, and each round gives a ratio. A step is all of it: the
batches of three environments, the tower unless its features are cached, the update. Computing the features is not in
it; it is told once. `loading` is the share of a step on features that is neither tower nor update.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import spread, subset
from tabulate import tabulate

from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.evaluation import EVAL_BATCH, evaluation_mode
from domainbed_hp.training.feature_cache import load_features
from domainbed_hp.training.model_io import build_algorithm, seed_everything
from domainbed_hp.training.setup import RunSetup, set_up_run

TEXT_SIDES = ("random", "coop")


class Variant:
    """One way to train: steps follow each other over all rounds."""

    def __init__(self, run: RunSetup, algorithm: Any) -> None:
        self.run, self.algorithm, self.batches, self.t = run, algorithm, run.make_train_loader(), 0

    def seconds(self, steps: int) -> tuple[float, float]:
        """Per step, and of it for loading."""
        loading, start = 0.0, time.perf_counter()
        for _ in range(steps):
            begin = time.perf_counter()
            minibatches = [batch.to(self.run.device, self.run.preprocess) for batch in self.batches[self.t]]
            loading += time.perf_counter() - begin
            self.algorithm.update(minibatches)
            self.t += 1
        return (time.perf_counter() - start) / steps, loading / steps


def variants(folder: Path, prompt: str, batch: int, device: str | None) -> tuple[Variant, Variant, float]:
    """Training on features and on images, and the seconds that computing the features took."""
    hparams = f'{{"prompt": "{prompt}", "clip_pretrained": "random", "batch_size": {batch}}}'
    run = set_up_run(RunArgs("not written", str(folder), "PACS", "FrozenCLIP", hparams=hparams, device=device))
    seed_everything(0)
    algorithm = build_algorithm(run.model_spec).to(run.device)
    start = time.perf_counter()
    with evaluation_mode(algorithm), ThreadPool(run.num_workers) as workers:
        features = load_features(run, algorithm, EVAL_BATCH[run.device.type], workers)
    assert features is not None
    return Variant(run.with_environments(features), algorithm), Variant(run, algorithm), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, default=32, help="of each environment")
    parser.add_argument("--batch", type=int, default=12, help="images of each environment in a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="on images, a round; on features 20 times as many")
    parser.add_argument("--device")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DOMAINBED_HP_CACHE"] = f"{folder}/cache"
        subset(args.data_dir, Path(folder), args.images)
        for prompt in TEXT_SIDES:
            cached, encode, once = variants(Path(folder), prompt, args.batch, args.device)
            times = []
            for round_i in range(args.rounds + 1):
                turns = [(cached, 20 * args.steps), (encode, args.steps)]
                done = {variant: variant.seconds(steps) for variant, steps in turns[:: 1 if round_i % 2 else -1]}
                times.append([*done[cached], *done[encode]])
            on_features, loading, on_images, _ = np.array(times[1:]).T  # the first round warms up
            steps = [f"{1 / np.median(seconds):.3g}" for seconds in (on_features, on_images)]
            ms = f"{1e3 * np.median(loading):.2f}"
            rows.append([f"prompt={prompt}", *steps, spread(on_images / on_features), ms, f"{once:.1f}"])
    headers = ["", "steps/s, cached", "steps/s, encode", "ratio (5 to 95 % of rounds)", "loading, ms/step", "once, s"]
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
