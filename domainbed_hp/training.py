"""One run, start to `done`: arguments in, records out. The only file that knows both an algorithm and a data set."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from domainbed_hp import hparams_registry, records
from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.algorithms.base import Pixels
from domainbed_hp.datasets.loader import EvalLoader, ReferenceSteps, TrainSteps, eval_loaders
from domainbed_hp.datasets.opened import find_spec, open_dataset
from domainbed_hp.datasets.prefetch import Workers
from domainbed_hp.datasets.splits import splits
from domainbed_hp.logs import log_to, print_header, print_row, versions
from domainbed_hp.models import Recipe, build, save_model
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import seed_hash

EVAL_BATCH = {"cuda": 1024, "cpu": 64}
"""Images scored at once, while they fit; a CPU is no faster beyond its cache."""
PROBE = 64
"""Validation images of an environment that `Algorithm.diagnose` sees."""
WORKERS = 8
"""At most so many loader threads where the model is on a GPU; on the CPU it loads by itself."""


EXAMPLE = """'{"lr": 1e-4}'"""


@dataclass(frozen=True)
class RunArgs:
    """The arguments of a run, written verbatim into every record. Defaults and meaning are DomainBed's train.py's."""

    output_dir: str
    data_dir: str | None = None
    dataset: str = "ShapesDG"
    algorithm: str = "HeadPurification"
    task: str = "domain_generalization"
    hparams: str | None = None
    """JSON object of overrides."""
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    checkpoint_freq: int | None = None
    test_envs: tuple[int, ...] = (0,)
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    device: str | None = None
    precision: str = "fp32"
    imports: tuple[str, ...] = ()
    label: str | None = None
    eval_images: int | None = None
    loader: str = "batched"
    num_workers: int | None = None


def train(args: RunArgs) -> None:
    """Train one algorithm on all environments but `test_envs`, score all of them, write `output_dir`.

    `UsageError` for anything that does not fit, before a model is built.
    """
    # Everything that can be refused is refused here.
    overrides = parse_overrides(args.hparams)
    hparams = hparams_registry.resolve(args.algorithm, args.dataset, args.hparams_seed, args.trial_seed, overrides)
    algorithm_class = get_algorithm_class(args.algorithm)
    spec = find_spec(args.dataset, args.data_dir)
    device = find_device(args.device)
    steps = algorithm_class.STEPS or (spec.steps if args.steps is None else args.steps)
    freq = spec.checkpoint_freq if args.checkpoint_freq is None else args.checkpoint_freq
    num_workers = default_workers(device) if args.num_workers is None else args.num_workers
    if steps < 1 or freq < 1 or num_workers < 0:
        got = f"{steps}, {freq} and {num_workers}"
        raise UsageError(f"steps, checkpoint_freq and num_workers: got {got}, expected at least 1, 1 and 0")
    output_dir = Path(args.output_dir)
    # DEVIATION: DomainBed appends a second run to the records of the first.
    if (output_dir / records.FILE_NAME).exists():
        raise UsageError(f"{output_dir} already holds a run: choose another --output_dir or remove it")
    pixels = algorithm_class.pixels(hparams, spec.image_size)
    reference = args.loader == "reference"
    dataset = open_dataset(spec, Path(args.data_dir) if args.data_dir else None, pixels, decode=reference)
    lengths = [len(images) for images in dataset.environments]
    split = splits(lengths, args.test_envs, args.trial_seed, args.holdout_fraction, args.uda_holdout_fraction)
    train_envs = [i for i in range(len(lengths)) if i not in args.test_envs]
    if not train_envs:
        raise UsageError(f"test_envs {list(args.test_envs)} leaves no environment to train on, of {len(lengths)}")

    # Loaders: every item is a function of the seed and its index.
    on_gpu = device.type == "cuda"
    sampling: dict[str, Any] = {"batch_size": hparams["batch_size"], "pixels": pixels, "seed": args.seed, "pin": on_gpu}
    Steps = ReferenceSteps if reference else TrainSteps
    labeled = Steps(
        dataset.environments, split, train_envs, class_balanced=hparams.get("class_balanced", False), **sampling
    )
    unlabeled = None
    if args.task == "domain_adaptation":
        unlabeled = TrainSteps(dataset.environments, split, args.test_envs, unlabeled=True, **sampling)
    steps_per_epoch = min(len(s["in"]) for s in split) / hparams["batch_size"]

    with log_to(output_dir), Workers(num_workers) as workers:
        print_header(asdict(args), hparams)
        print(f"Images: {dataset.source}")
        seed_everything(args.seed)
        recipe = Recipe(args.algorithm, hparams, steps, pixels.size, tuple(dataset.class_names), len(train_envs))
        algorithm = build(recipe).to(device)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        batch_size = EVAL_BATCH["cuda" if on_gpu else "cpu"]
        scored = eval_loaders(dataset.environments, split, batch_size, workers, max_images=args.eval_images, pin=on_gpu)
        some = min(PROBE, args.eval_images or PROBE)
        held_out = [EvalLoader(dataset.environments[i], split[i]["out"][:some], some) for i in train_envs]
        probe = [loader[0].to(device, pixels) for loader in held_out if len(loader)]
        with evaluation(algorithm), cast:
            algorithm.diagnose(probe)  # before training, so that it can fix its scales

        # The loop.
        since: dict[str, list[float]] = defaultdict(list)
        columns: list[str] = []
        batches = zip(
            workers.map(labeled.__getitem__, range(steps)),
            workers.map(unlabeled.__getitem__, range(steps)) if unlabeled else [None] * steps,
            strict=True,
        )
        for step, (ours, extra) in enumerate(tqdm(batches, total=steps, disable=None, unit="step")):
            torch.manual_seed(seed_hash(args.seed, "update", step))  # dropout is a function of the step, too
            start = time.perf_counter()
            minibatches = [batch.to(device, pixels) for batch in ours]
            unlabeled_x = None if extra is None else [batch.to(device, pixels)[0] for batch in extra]
            with cast:
                metrics = algorithm.update(minibatches, unlabeled_x)
            since["step_time"].append(time.perf_counter() - start)
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {step}: try a smaller lr, or --precision fp32")
                since[name].append(value)

            if step % freq == 0 or step == steps - 1:
                record: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch}
                record |= {name: float(np.mean(values)) for name, values in since.items()}
                with evaluation(algorithm), cast:
                    record |= {
                        f"{name}_acc": accuracy(algorithm, loader, device, pixels) for name, loader in scored.items()
                    }
                    record |= algorithm.diagnose(probe)
                record["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
                columns = print_row(record, columns)
                record |= {"hparams": hparams, "args": asdict(args), "versions": versions()}
                records.append(output_dir, record)
                since.clear()
                if args.save_model_every_checkpoint:
                    save_model(output_dir / f"model_step{step}.safetensors", algorithm, recipe)

        if not args.skip_model_save:
            save_model(output_dir / "model.safetensors", algorithm, recipe)
        (output_dir / "done").write_text("done")


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`--hparams` as a dict; `UsageError` unless it is a JSON object."""
    try:
        overrides = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"--hparams: got {text!r}, expected a JSON object such as {EXAMPLE} ({error})") from error
    if not isinstance(overrides, dict):
        raise UsageError(f"--hparams: got {text!r}, expected a JSON object such as {EXAMPLE}")
    return overrides


def find_device(name: str | None) -> torch.device:
    """The device called `name`; None: a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        known = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}. Known here: {known}") from error
    return device


def default_workers(device: torch.device) -> int:
    return min(WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0


def seed_everything(seed: int) -> None:
    """Seed every global generator, for the initialisation of weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def evaluation(algorithm: Algorithm) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    algorithm.eval()
    with torch.no_grad():
        yield
    algorithm.train()


def accuracy(algorithm: Algorithm, loader: EvalLoader, device: torch.device, pixels: Pixels) -> float:
    """Share of right answers, in [0, 1], of one pass; where a GPU runs out of memory, of the next with half the batch.

    Source: DomainBed's lib/misc.py; a single logit says class 1 above 0.
    """
    while True:
        try:
            return sum(correct(algorithm, *batch.to(device, pixels)) for batch in loader) / len(loader.indices)
        except torch.cuda.OutOfMemoryError:
            if loader.batch_size == 1:
                raise
        loader.batch_size //= 2  # out of the handler, whose traceback holds the memory


def correct(algorithm: Algorithm, x: Tensor, y: Tensor) -> int:
    p = algorithm.predict(x)
    answer = p.argmax(1) if p.shape[1] > 1 else (p.squeeze(1) > 0).long()
    return int((answer == y).sum())
