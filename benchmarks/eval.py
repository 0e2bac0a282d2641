"""How fast images are scored: the method, its export as a plain CLIP, LoRA, and a frozen tower, on images or features.

    python benchmarks/eval.py DATA_DIR

DATA_DIR holds PACS/, of which 16 images of each environment are taken and prepared. ViT-B/16 with random weights (speed
is the same), adapters and gates away from their start; `exported` is the method's merged weights in a plain tower.
`scoring.score` does it all: reading, moving, the tower, the metrics. Computing the features that are cached is not in
it. On the CPU one pinned core. Variants take turns round by round in one process; a turn scores --images images of one
environment, the same ones again where it has fewer, another environment each round; and each round gives a ratio.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import number, one_thread, prepare_for, quiet, spread, subset, synchronise, turns
from tabulate import tabulate

from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm
from domainbed_hp.datasets.loading.loader import EvalLoader
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.evaluation import evaluation_mode, score_split
from domainbed_hp.training.feature_cache import load_features
from domainbed_hp.training.model_io import build_algorithm, seed_everything
from domainbed_hp.training.setup import RunSetup, find_device, set_up_run

BATCHES = {"cpu": (16, 64), "cuda": (64, 256, 1024)}
IMAGES = {"cpu": 64, "cuda": 4096}
FILES = 16
FROZEN = "ZeroShotCLIP"
ENCODE = f"{FROZEN}, --features encode"


def model(args: RunArgs) -> tuple[RunSetup, ClipAlgorithm]:
    """On the CPU; of one seed, so that the towers' random weights are the same, and what trains is moved."""
    run = set_up_run(args)
    seed_everything(0)
    algorithm = build_algorithm(run.model_spec)
    assert isinstance(algorithm, ClipAlgorithm)
    with torch.no_grad():
        for parameter in algorithm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return run, algorithm


def exported(method: ClipAlgorithm, frozen: ClipAlgorithm) -> ClipAlgorithm:
    """`frozen` with the merged weights of `method`, which must then compute the same."""
    frozen.tower.load_state_dict({name.removeprefix("visual."): value for name, value in method.merge().items()})
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(frozen.eval().encode(x), method.eval().encode(x), rtol=1e-3, atol=1e-4)
    return frozen


class Scoring:
    """Seconds in which an algorithm scores images of the environments of a run."""

    def __init__(self, run: RunSetup, algorithm: ClipAlgorithm, workers: ThreadPool) -> None:
        self.run, self.algorithm, self.workers = run, algorithm.to(run.device), workers
        self.cast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.args.precision == "bf16")

    def on_features(self, batch: int) -> "Scoring":
        with quiet(), evaluation_mode(self.algorithm), self.cast:
            features = load_features(self.run, self.algorithm, batch, self.workers)
        assert features is not None
        return Scoring(self.run.with_environments(features), self.algorithm, self.workers)

    def seconds(self, env: int, images: int, batch: int) -> float:
        run = self.run
        views = run.dataset.environments[env]
        loader = EvalLoader(views, np.resize(np.arange(len(views)), images), batch, self.workers, pin=run.on_gpu)
        synchronise(run.device)
        start = time.perf_counter()
        with evaluation_mode(self.algorithm), self.cast:
            score_split(self.algorithm, loader, run.device, run.preprocess)
        synchronise(run.device)
        assert loader.batch_size == batch, f"batches of {batch} do not fit"
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, help=f"scored in a turn; default: {IMAGES}")
    parser.add_argument("--batches", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    device = find_device(args.device)
    machine, batches = one_thread(device), args.batches or BATCHES[device.type]
    images = args.images or IMAGES[device.type]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DOMAINBED_HP_CACHE"] = f"{folder}/cache"
        subset(args.data_dir, Path(folder), FILES)

        def run_args(algorithm: str) -> RunArgs:
            hparams = json.dumps({"clip_pretrained": "random"})
            more = {"hparams": hparams, "device": args.device, "precision": args.precision}
            return RunArgs("not written", folder, "PACS", algorithm, **more)

        prepare_for(run_args(FROZEN))
        with quiet():
            method, lora, frozen, plain = map(model, map(run_args, ("HeadPurification", "LoRA", FROZEN, FROZEN)))
        with ThreadPool(method[0].num_workers) as workers:
            scorings = {
                ENCODE: Scoring(*frozen, workers),
                "HeadPurification": Scoring(*method, workers),
                "HeadPurification, exported": Scoring(plain[0], exported(method[1], plain[1]), workers),
                "LoRA": Scoring(*lora, workers),
            }
            scorings[f"{FROZEN}, cached features"] = scorings[ENCODE].on_features(max(batches))
            for batch in batches:
                variants: dict[str, Callable[[int], float]] = {
                    name: lambda t, scoring=scoring, batch=batch: scoring.seconds(t % 4, images, batch)
                    for name, scoring in scorings.items()
                }
                turns(variants, 1)  # warms up
                taken = {name: np.array(times) for name, times in turns(variants, args.rounds).items()}
                for name, times in taken.items():
                    rows.append([batch, name, number(images / np.median(times)), spread(taken[ENCODE] / times)])
    print(f"ViT-B/16, {machine}, {args.precision}: {images} images a turn, {args.rounds} rounds")
    print(tabulate(rows, ["batch", "", "images/s", "times frozen (5 to 95 % of rounds)"], disable_numparse=True))


if __name__ == "__main__":
    main()
