"""One run, start to `done`: arguments in, records out. The only file that knows both an algorithm and a data set."""

from __future__ import annotations

import contextlib
import json
import math
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
from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.datasets.loader import EvalLoader, TrainSteps, eval_loaders, train_loader
from domainbed_hp.datasets.opened import open_dataset
from domainbed_hp.datasets.splits import splits
from domainbed_hp.logs import log_to, print_header, print_row, versions
from domainbed_hp.models import Recipe, build, save_model
from domainbed_hp.registry import DATASETS, UsageError, load
from domainbed_hp.seeds import seed_hash

EVAL_BATCH = 64
WORKERS = 8
"""Loader processes where the model is on a GPU, as DomainBed's N_WORKERS; on the CPU it loads by itself."""


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


def train(args: RunArgs) -> None:
    """Train one algorithm on all environments but `test_envs`, score all of them, write `output_dir`.

    `UsageError` for anything that does not fit, before a model is built.
    """
    # Everything that can be refused is refused here.
    overrides = parse_overrides(args.hparams)
    hparams = hparams_registry.resolve(args.algorithm, args.dataset, args.hparams_seed, args.trial_seed, overrides)
    algorithm_class = get_algorithm_class(args.algorithm)
    dataset = open_dataset(load(DATASETS, "dataset", args.dataset), Path(args.data_dir) if args.data_dir else None)
    lengths = [len(images) for images in dataset.environments]
    split = splits(lengths, args.test_envs, args.trial_seed, args.holdout_fraction, args.uda_holdout_fraction)
    train_envs = [i for i in range(len(lengths)) if i not in args.test_envs]
    if not train_envs:
        raise UsageError(f"test_envs {list(args.test_envs)} leaves no environment to train on, of {len(lengths)}")
    device = find_device(args.device)
    steps = algorithm_class.STEPS or (dataset.spec.steps if args.steps is None else args.steps)
    freq = dataset.spec.checkpoint_freq if args.checkpoint_freq is None else args.checkpoint_freq
    if steps < 1 or freq < 1:
        raise UsageError(f"steps and checkpoint_freq: got {steps} and {freq}, expected at least 1")
    output_dir = Path(args.output_dir)
    # DEVIATION: DomainBed appends a second run to the records of the first.
    if (output_dir / records.FILE_NAME).exists():
        raise UsageError(f"{output_dir} already holds a run: choose another --output_dir or remove it")

    # Loaders: every item is a function of the seed and its index.
    pixels = algorithm_class.pixels(hparams, dataset.spec.image_size)
    on_gpu = device.type == "cuda"
    workers: dict[str, Any] = {"num_workers": WORKERS if on_gpu else 0, "pin_memory": on_gpu}
    sampling: dict[str, Any] = {"batch_size": hparams["batch_size"], "pixels": pixels, "seed": args.seed}
    labeled = TrainSteps(
        dataset.environments, split, train_envs, class_balanced=hparams.get("class_balanced", False), **sampling
    )
    unlabeled = None
    if args.task == "domain_adaptation":
        unlabeled = TrainSteps(dataset.environments, split, args.test_envs, unlabeled=True, **sampling)
    scored = eval_loaders(dataset.environments, split, EVAL_BATCH, pixels, max_images=args.eval_images, **workers)
    steps_per_epoch = min(len(s["in"]) for s in split) / hparams["batch_size"]

    with log_to(output_dir):
        print_header(asdict(args), hparams)
        seed_everything(args.seed)
        recipe = Recipe(args.algorithm, hparams, steps, pixels.size, tuple(dataset.class_names), len(train_envs))
        algorithm = build(recipe).to(device)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        probe = [to_device(next(iter(scored[f"env{i}_out"])), device) for i in train_envs if f"env{i}_out" in scored]
        with evaluation(algorithm), cast:
            algorithm.diagnose(probe)  # before training, so that it can fix its scales

        # The loop.
        since: dict[str, list[float]] = defaultdict(list)
        columns: list[str] = []
        batches = zip(
            train_loader(labeled, 0, steps, **workers),
            train_loader(unlabeled, 0, steps, **workers) if unlabeled else [None] * steps,
            strict=True,
        )
        for step, (minibatches, extra) in enumerate(tqdm(batches, total=steps, disable=None, unit="step")):
            torch.manual_seed(seed_hash(args.seed, "update", step))  # dropout is a function of the step, too
            start = time.perf_counter()
            with cast:
                metrics = algorithm.update(
                    [to_device(minibatch, device) for minibatch in minibatches],
                    None if extra is None else [pixels_to_device(x, device) for x in extra],
                )
            since["step_time"].append(time.perf_counter() - start)
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {step}: try a smaller lr, or --precision fp32")
                since[name].append(value)

            if step % freq == 0 or step == steps - 1:
                record: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch}
                record |= {name: float(np.mean(values)) for name, values in since.items()}
                with evaluation(algorithm), cast:
                    record |= {f"{name}_acc": accuracy(algorithm, loader, device) for name, loader in scored.items()}
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


def seed_everything(seed: int) -> None:
    """Seed every global generator, for the initialisation of weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pixels_to_device(x: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float in [0, 1], on the device."""
    return x.to(device, non_blocking=True).float().div_(255)


def to_device(minibatch: Minibatch, device: torch.device) -> Minibatch:
    x, y = minibatch
    return pixels_to_device(x, device), y.to(device, non_blocking=True)


@contextlib.contextmanager
def evaluation(algorithm: Algorithm) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    algorithm.eval()
    with torch.no_grad():
        yield
    algorithm.train()


def accuracy(algorithm: Algorithm, loader: EvalLoader, device: torch.device) -> float:
    """Share of right answers, in [0, 1]. Source: DomainBed's lib/misc.py; a single logit says class 1 above 0."""
    correct = total = 0
    for minibatch in loader:
        x, y = to_device(minibatch, device)
        p = algorithm.predict(x)
        answer = p.argmax(1) if p.shape[1] > 1 else (p.squeeze(1) > 0).long()
        correct += int((answer == y).sum())
        total += len(y)
    return correct / total
