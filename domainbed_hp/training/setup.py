"""From the arguments of a run to all that it needs, refusing whatever does not fit before a model is built."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from domainbed_hp import hparams_registry
from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.datasets.loading.loader import TrainLoader
from domainbed_hp.datasets.loading.transforms import ImageViews
from domainbed_hp.datasets.open import Dataset, find_spec, open_dataset
from domainbed_hp.datasets.splits import split_environments
from domainbed_hp.files import cpu_count
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.model_io import Recipe

WORKERS = 8
"""At most so many loader threads where the model is on a GPU; on the CPU it loads by itself."""

EXAMPLE = """'{"lr": 1e-4}'"""


@dataclass(frozen=True)
class Plan:
    """A run that can start."""

    args: RunArgs
    algorithm: type[Algorithm]
    hparams: dict[str, Any]
    dataset: Dataset
    split: list[dict[str, list[int]]]
    """Per environment."""
    train_envs: list[int]
    preprocess: Preprocess
    device: torch.device
    steps: int
    checkpoint_freq: int
    num_workers: int

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def recipe(self) -> Recipe:
        names, size = tuple(self.dataset.class_names), self.preprocess.size
        return Recipe(self.args.algorithm, self.hparams, self.steps, size, names, len(self.train_envs))

    @property
    def protocol(self) -> dict[str, Any]:
        """Under what terms the run's numbers stand: weights and text of the method, images, part of the target."""
        size, resize, interpolation, augmentation = self.preprocess
        images = f"{size} px, {resize}, {interpolation}; training: {augmentation}"
        share = (1 - self.args.holdout_fraction) * (1 - self.args.uda_holdout_fraction)
        return {"preprocessing": images, "target_split": f"in, {share:.0%}"} | self.algorithm.describe_protocol(
            self.hparams
        )

    @property
    def scored(self) -> list[dict[str, list[int]]]:
        """The splits that records score."""
        if self.args.eval == "full":
            return self.split
        return [
            {name: indices for name, indices in split.items() if name != "in" or i in self.args.test_envs}
            for i, split in enumerate(self.split)
        ]

    @property
    def steps_per_epoch(self) -> float:
        """As DomainBed's: of the smallest environment, test environments included."""
        return min(len(split["in"]) for split in self.split) / float(self.hparams["batch_size"])

    def on(self, environments: list[ImageViews]) -> Plan:
        """The same run on other views of the same images, such as their features."""
        return replace(self, dataset=replace(self.dataset, environments=environments))

    def batches(self) -> TrainLoader:
        """The labeled minibatches of each step."""
        return self._steps(self.train_envs, class_balanced=self.hparams.get("class_balanced", False))

    def unlabeled_batches(self) -> TrainLoader | None:
        """Those of the test environments, for domain adaptation."""
        if self.args.task != "domain_adaptation":
            return None
        return self._steps(list(self.args.test_envs), unlabeled=True)

    def _steps(self, envs: list[int], **options: bool) -> TrainLoader:
        batch_size, seed = self.hparams["batch_size"], self.args.seed
        environments = self.dataset.environments
        return TrainLoader(
            environments, self.split, envs, batch_size, self.preprocess, seed, pin=self.on_gpu, **options
        )


def plan(args: RunArgs) -> Plan:
    """Everything that a run needs but its model; `UsageError` for anything that does not fit."""
    overrides = parse_overrides(args.hparams)
    hparams = hparams_registry.resolve_hparams(
        args.algorithm, args.dataset, args.hparams_seed, args.trial_seed, overrides
    )
    algorithm = get_algorithm_class(args.algorithm)
    spec = find_spec(args.dataset, args.data_dir)
    device = find_device(args.device)
    steps = algorithm.STEPS or (spec.steps if args.steps is None else args.steps)
    freq = spec.checkpoint_freq if args.checkpoint_freq is None else args.checkpoint_freq
    num_workers = default_workers(device) if args.num_workers is None else args.num_workers
    if steps < 1 or freq < 1 or num_workers < 0:
        got = f"{steps}, {freq} and {num_workers}"
        raise UsageError(f"steps, checkpoint_freq and num_workers: got {got}, expected at least 1, 1 and 0")
    preprocess = algorithm.preprocess(hparams, spec.image_size)
    dataset = open_dataset(spec, Path(args.data_dir) if args.data_dir else None, preprocess)
    lengths = [len(images) for images in dataset.environments]
    split = split_environments(
        lengths, args.test_envs, args.trial_seed, args.holdout_fraction, args.uda_holdout_fraction
    )
    train_envs = [i for i in range(len(lengths)) if i not in args.test_envs]
    if not train_envs:
        raise UsageError(f"test_envs {list(args.test_envs)} leaves no environment to train on, of {len(lengths)}")
    hparams_registry.check_validation_images(hparams, any(split[i]["out"] for i in train_envs))
    run = Plan(args, algorithm, hparams, dataset, split, train_envs, preprocess, device, steps, freq, num_workers)
    run.batches(), run.unlabeled_batches()  # they refuse empty splits
    return run


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
    return min(WORKERS, cpu_count()) if device.type == "cuda" else 0
