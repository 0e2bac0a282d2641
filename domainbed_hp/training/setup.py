"""Set up a run from its arguments: everything that it needs but its model. Arguments that do not fit are refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from domainbed_hp import hparams_registry
from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.datasets.loading.loader import TrainLoader
from domainbed_hp.datasets.open import Dataset, find_spec, open_dataset
from domainbed_hp.datasets.spec import ImageViews
from domainbed_hp.datasets.splits import split_environments
from domainbed_hp.files import cpu_count
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs, parse_hparams
from domainbed_hp.training.model_io import ModelSpec

MAX_WORKERS = 8
"""Default number of loader threads on a GPU, or the number of cores if smaller. On the CPU the default is 0."""


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run needs but its model."""

    args: RunArgs
    algorithm: type[Algorithm]
    hparams: dict[str, Any]
    protocol: dict[str, Any]
    """The conditions of the run's numbers: pretrained weights, text, preprocessing, the scored part of the target."""
    dataset: Dataset
    splits: list[dict[str, list[int]]]
    """One dict per environment: name of a split -> indices of its images."""
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
    def model_spec(self) -> ModelSpec:
        names, size = tuple(self.dataset.class_names), self.preprocess.size
        return ModelSpec(self.args.algorithm, self.hparams, self.steps, size, names, len(self.train_envs))

    @property
    def scored_splits(self) -> list[dict[str, list[int]]]:
        """The splits that every record scores."""
        if self.args.eval == "full":
            return self.splits
        return [
            {name: indices for name, indices in split.items() if name != "in" or i in self.args.test_envs}
            for i, split in enumerate(self.splits)
        ]

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one epoch of the smallest environment, test environments included, as in DomainBed."""
        return min(len(split["in"]) for split in self.splits) / float(self.hparams["batch_size"])

    def with_environments(self, environments: list[ImageViews]) -> Self:
        """Return the run on other views of the same images, such as their features."""
        return replace(self, dataset=replace(self.dataset, environments=environments))

    def make_train_loader(self) -> TrainLoader:
        """Return the loader of the labeled minibatches of every step."""
        return self._make_loader(self.train_envs, class_balanced=self.hparams.get("class_balanced", False))

    def make_unlabeled_loader(self) -> TrainLoader | None:
        """Return the loader of the test environments' unlabeled minibatches, None without domain adaptation."""
        if self.args.task != "domain_adaptation":
            return None
        return self._make_loader(list(self.args.test_envs), unlabeled=True)

    def _make_loader(self, envs: list[int], **options: bool) -> TrainLoader:
        data, batch_size, seed = self.dataset.environments, self.hparams["batch_size"], self.args.seed
        return TrainLoader(data, self.splits, envs, batch_size, self.preprocess, seed, pin=self.on_gpu, **options)


def set_up_run(args: RunArgs) -> RunSetup:
    """Resolve hparams, open the data set and split it; `UsageError` for arguments that do not fit."""
    seeds, overrides = (args.hparams_seed, args.trial_seed), parse_hparams(args.hparams)
    hparams = hparams_registry.resolve_hparams(args.algorithm, args.dataset, *seeds, overrides)
    algorithm = get_algorithm_class(args.algorithm)
    spec = find_spec(args.dataset, args.data_dir)
    device = find_device(args.device)
    steps = algorithm.STEPS or (spec.steps if args.steps is None else args.steps)
    freq = spec.checkpoint_freq if args.checkpoint_freq is None else args.checkpoint_freq
    default_workers = min(MAX_WORKERS, cpu_count()) if device.type == "cuda" else 0
    num_workers = default_workers if args.num_workers is None else args.num_workers
    preprocess = algorithm.preprocess(hparams, spec.image_size)
    dataset = open_dataset(spec, Path(args.data_dir) if args.data_dir else None, preprocess)
    lengths = [len(images) for images in dataset.environments]
    fractions = args.holdout_fraction, args.uda_holdout_fraction
    splits = split_environments(lengths, args.test_envs, args.trial_seed, *fractions)
    train_envs = [i for i in range(len(lengths)) if i not in args.test_envs]
    if not train_envs:
        raise UsageError(f"test_envs: got all {len(lengths)} environments, which leaves no environment to train on")
    hparams_registry.check_validation_images(hparams, any(splits[i]["out"] for i in train_envs))
    size, resize, interpolation, augmentation = preprocess
    protocol = {
        "preprocessing": f"{size} px, {resize}, {interpolation}; training: {augmentation}",
        "target_split": f"in, {(1 - args.holdout_fraction) * (1 - args.uda_holdout_fraction):.0%}",
        **algorithm.describe_protocol(hparams),
    }
    run = RunSetup(
        args, algorithm, hparams, protocol, dataset, splits, train_envs, preprocess, device, steps, freq, num_workers
    )
    run.make_train_loader(), run.make_unlabeled_loader()  # they refuse empty splits
    return run


def find_device(name: str | None) -> torch.device:
    """Return the device called `name`, by default a GPU if there is one; `UsageError` if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        known = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}. Known here: {known}") from error
    return device
