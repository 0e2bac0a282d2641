"""Minibatches and scoring batches as uint8 tensors; both are pure functions of a seed and an index.

A run can therefore resume at step t without any loader state, and neither the number of workers nor how often a
model is scored changes what it trains on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from domainbed_hp.datasets.spec import Images
from domainbed_hp.datasets.transforms import Pixels, augment, evaluate
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import rng

Splits = Sequence[Mapping[str, Sequence[int]]]
"""Per environment the indices of its splits, as from `splits.splits`."""

KEEP_BYTES = 2**30
"""Memory for images that are scored again at every checkpoint."""


class TrainSteps(TorchDataset[Any]):
    """Item t is step t: for each environment of `envs` a minibatch (x uint8 (B, 3, S, S), y int64 (B,)).

    Images are drawn with replacement from split `in`, as by DomainBed's InfiniteDataLoader, so that a split may be
    smaller than a batch. `class_balanced` draws every class equally often. `unlabeled`: x alone, of split `uda`, not
    augmented, as DomainBed's domain adaptation.

    # DEVIATION: DomainBed draws batches, augmentation and the order of evaluation from the global generator, so that
    # how often a model is scored changes what it becomes; and it never returns for a split smaller than a batch.
    """

    def __init__(
        self,
        environments: Sequence[Images],
        splits: Splits,
        envs: Sequence[int],
        batch_size: int,
        pixels: Pixels,
        seed: int,
        *,
        class_balanced: bool = False,
        unlabeled: bool = False,
    ) -> None:
        split = "uda" if unlabeled else "in"
        advice = "pass --uda_holdout_fraction above 0" if unlabeled else "train on environments that have images"
        self.environments, self.envs, self.batch_size, self.seed = environments, list(envs), batch_size, seed
        self.pixels, self.unlabeled = pixels, unlabeled
        self.indices = {env: np.asarray(splits[env].get(split, ()), np.int64) for env in envs}
        for env, indices in self.indices.items():
            if not len(indices):
                raise UsageError(
                    f"environment {env}: none of its {len(environments[env])} images is in split {split!r}; {advice}"
                )
        self.weights = {env: self._weights(env) if class_balanced and not unlabeled else None for env in envs}

    def _weights(self, env: int) -> np.ndarray:
        """Probability of each image, such that classes are equally likely, as DomainBed's lib/misc.py."""
        _, which, counts = np.unique(
            self.environments[env].labels[self.indices[env]], return_inverse=True, return_counts=True
        )
        return 1 / (len(counts) * counts[which])

    def __getitem__(self, t: int) -> list[Any]:
        return [self._minibatch(env, t) for env in self.envs]

    def _minibatch(self, env: int, t: int) -> tuple[Tensor, Tensor] | Tensor:
        images, p = self.environments[env], self.pixels
        chosen = rng(self.seed, "batch", env, t).choice(self.indices[env], self.batch_size, p=self.weights[env])
        augmentation = "none" if self.unlabeled else p.augmentation
        random = rng(self.seed, "augment", env, t)
        x = stack([augment(images[int(i)], p.size, p.resize, p.interpolation, augmentation, random) for i in chosen])
        return x if self.unlabeled else (x, torch.from_numpy(images.labels[chosen]))


def train_loader(
    dataset: TrainSteps, start: int, steps: int, *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader[Any]:
    """Steps `start` to `steps` - 1 in order. `pin_memory` where the model is on a GPU."""
    return in_order(dataset, range(start, steps), num_workers, pin_memory)


class EvalBatches(TorchDataset[Any]):
    """Item k is the k-th batch (x uint8 (B, 3, S, S), y int64 (B,)) of the images `indices`, in that order."""

    def __init__(self, images: Images, indices: Sequence[int], batch_size: int, pixels: Pixels) -> None:
        self.images, self.indices = images, np.asarray(indices, np.int64)
        self.batch_size, self.pixels = batch_size, pixels

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        chosen, p = self.indices[k * self.batch_size : (k + 1) * self.batch_size], self.pixels
        x = stack([evaluate(self.images[int(i)], p.size, p.resize, p.interpolation) for i in chosen])
        return x, torch.from_numpy(self.images.labels[chosen])


class EvalLoader:
    """Batches (x, y) in order, as often as asked for; with `keep` they stay in memory after the first whole pass."""

    def __init__(self, batches: EvalBatches, *, keep: bool, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.batches, self.keep, self.num_workers, self.pin_memory = batches, keep, num_workers, pin_memory
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.kept is not None:
            yield from self.kept
            return
        passed = []
        for batch in in_order(self.batches, range(len(self.batches)), self.num_workers, self.pin_memory):
            if self.keep:
                passed.append(batch)
            yield batch
        if self.keep:
            self.kept = passed


def eval_loader(
    images: Images,
    indices: Sequence[int],
    batch_size: int,
    pixels: Pixels,
    *,
    keep: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalLoader:
    """The images `indices` in order, as they are scored.

    # DEVIATION: DomainBed scores the `out` splits of training environments on augmented images.
    """
    return EvalLoader(
        EvalBatches(images, indices, batch_size, pixels), keep=keep, num_workers=num_workers, pin_memory=pin_memory
    )


def eval_loaders(
    environments: Sequence[Images],
    splits: Splits,
    batch_size: int,
    pixels: Pixels,
    *,
    max_images: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> dict[str, EvalLoader]:
    """One loader per split, named "env0_in", "env0_out", ...

    Splits stay in memory, smallest first, up to `keep_bytes` in all. `max_images` scores the first of each split,
    which is a random choice since splits are permuted.
    """
    chosen = {
        f"env{env_i}_{name}": (environments[env_i], list(indices)[:max_images])
        for env_i, split in enumerate(splits)
        for name, indices in split.items()
        if len(indices)
    }
    keep = set()
    for name in sorted(chosen, key=lambda name: len(chosen[name][1])):
        keep_bytes -= len(chosen[name][1]) * 3 * pixels.size**2
        if keep_bytes >= 0:
            keep.add(name)
    return {
        name: eval_loader(
            *source, batch_size, pixels, keep=name in keep, num_workers=num_workers, pin_memory=pin_memory
        )
        for name, source in chosen.items()
    }


def stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images))


def in_order(dataset: TorchDataset[Any], order: range, num_workers: int, pin_memory: bool) -> DataLoader[Any]:
    """A loader of whole items that draws nothing from the global generators."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
