"""Minibatches and scoring batches as uint8; all are pure functions of a seed and an index.

A run can therefore resume at step t without any loader state, and neither the number of workers nor how often a
model is scored changes what it trains on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from domainbed_hp.datasets.loading.augment import Draws, augment, draw
from domainbed_hp.datasets.loading.prefetch import Workers
from domainbed_hp.datasets.loading.transforms import Views
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import rng

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

Splits = Sequence[Mapping[str, Sequence[int]]]
"""Per environment the indices of its splits, as from `splits.splits`."""


class Batch(NamedTuple):
    """B images as they leave the host."""

    images: Tensor
    """uint8: (B, 3, S, S), or what `draws` are to be applied to, (B, H, W, 3). Features: float32 (B, E)."""
    labels: Tensor
    """(B,) int64"""
    draws: Draws | None = None

    def to(self, device: torch.device, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
        """(x, y) on `device`: x float (B, 3, S, S) in [0, 1], augmented; features as they are."""
        if self.images.is_floating_point():
            x = self.images.to(device, non_blocking=True)
        elif self.draws is None:
            x = self.images.to(device, non_blocking=True).float().div_(255)
        else:
            x = augment(self.images, self.draws, preprocess, device)
        return x, self.labels.to(device, non_blocking=True)


class TrainSteps:
    """Item t is step t: a `Batch` of each environment of `envs`.

    Images are drawn with replacement from split `in`, as by DomainBed's InfiniteDataLoader, so that a split may be
    smaller than a batch. `class_balanced` draws every class equally often. `unlabeled`: split `uda`, not augmented, as
    DomainBed's domain adaptation. `pin`: for a GPU.

    # DEVIATION: DomainBed draws batches, augmentation and the order of evaluation from the global generator, so that
    # how often a model is scored changes what it becomes; and it never returns for a split smaller than a batch.
    """

    def __init__(
        self,
        environments: Sequence[Views],
        splits: Splits,
        envs: Sequence[int],
        batch_size: int,
        preprocess: Preprocess,
        seed: int,
        *,
        class_balanced: bool = False,
        unlabeled: bool = False,
        pin: bool = False,
    ) -> None:
        split = "uda" if unlabeled else "in"
        advice = "pass --uda_holdout_fraction above 0" if unlabeled else "train on environments that have images"
        self.environments, self.envs, self.batch_size, self.seed = environments, list(envs), batch_size, seed
        self.preprocess, self.pin = preprocess, pin
        self.augmentation = "none" if unlabeled else preprocess.augmentation
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

    def __getitem__(self, t: int) -> list[Batch]:
        return [self.minibatch(env, t) for env in self.envs]

    def minibatch(self, env: int, t: int) -> Batch:
        chosen = rng(self.seed, "batch", env, t).choice(self.indices[env], self.batch_size, p=self.weights[env])
        images, draws = self._images(self.environments[env], chosen.tolist(), rng(self.seed, "augment", env, t))
        labels = torch.from_numpy(self.environments[env].labels[chosen])
        if self.pin:
            images, labels = images.pin_memory(), labels.pin_memory()
        return Batch(images, labels, draws)

    def _images(self, views: Views, chosen: list[int], random: np.random.Generator) -> tuple[Tensor, Draws | None]:
        """What will be augmented on the device."""
        if self.augmentation == "none":
            return torch.from_numpy(np.stack([views.evaluation(i) for i in chosen])), None
        images = [views.training(i) for i in chosen]
        sizes = np.array([image.shape[:2] for image in images])
        padded = np.empty((len(images), *sizes.max(axis=0), 3), np.uint8)
        for target, image in zip(padded, images, strict=True):
            target[: image.shape[0], : image.shape[1]] = image
        return torch.from_numpy(padded), draw(sizes, self.augmentation, random)


class EvalLoader:
    """The images `indices` in that order, as they are scored, in batches; nothing starts before the first is asked for.

    # DEVIATION: DomainBed scores the `out` splits of training environments on augmented images.
    """

    def __init__(
        self,
        views: Views,
        indices: Sequence[int],
        batch_size: int,
        workers: Workers | None = None,
        *,
        pin: bool = False,
    ) -> None:
        self.views, self.indices, self.batch_size = views, np.asarray(indices, np.int64), batch_size
        self.workers, self.pin = workers or Workers(0), pin

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        chosen = self.indices[k * self.batch_size : (k + 1) * self.batch_size]
        images = torch.from_numpy(np.stack([self.views.evaluation(i) for i in chosen.tolist()]))
        return Batch(images.pin_memory() if self.pin else images, torch.from_numpy(self.views.labels[chosen]))

    def __iter__(self) -> Iterator[Batch]:
        return self.workers.map(self.__getitem__, range(len(self)))


def eval_loaders(
    environments: Sequence[Views],
    splits: Splits,
    batch_size: int,
    workers: Workers | None = None,
    *,
    max_images: int | None = None,
    pin: bool = False,
) -> dict[str, EvalLoader]:
    """One loader per split that is not empty, named "env0_in", "env0_out", ...

    `max_images` scores the first of each split, which is a random choice since splits are permuted.
    """
    return {
        f"env{env_i}_{name}": EvalLoader(environments[env_i], indices[:max_images], batch_size, workers, pin=pin)
        for env_i, split in enumerate(splits)
        for name, indices in split.items()
        if len(indices)
    }
