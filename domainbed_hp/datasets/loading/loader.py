"""Minibatches to train on and batches to score, as uint8: pure functions of a seed and an index.

A run therefore resumes at any step without loader state. Neither threads nor evaluation change the minibatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from domainbed_hp.datasets.loading.augment import Draws, augment, draw_augmentation
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.spec import ImageViews
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import rng

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

Splits = Sequence[Mapping[str, Sequence[int]]]
"""The indices of the splits of every environment, as `split_environments` returns them."""


class Batch(NamedTuple):
    """B images in the memory of the host."""

    images: Tensor
    """uint8 (B, 3, S, S) without `draws`, (B, H, W, 3) with them; or features, float32 (B, E)."""
    labels: Tensor
    """int64 (B,)."""
    draws: Draws | None = None
    """The augmentation that `to` applies."""

    def to(self, device: torch.device, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
        """Return (x, y) on `device`: x is float (B, 3, S, S) in [0, 1], augmented, or the features unchanged."""
        if self.images.is_floating_point():
            x = self.images.to(device, non_blocking=True)
        elif self.draws is None:
            x = self.images.to(device, non_blocking=True).float().div_(255)
        else:
            x = augment(self.images, self.draws, preprocess, device)
        return x, self.labels.to(device, non_blocking=True)


# DEVIATION: DomainBed draws batches, augmentation and the order of evaluation from the global generator, so that
# evaluation changes the training; and its loader never returns for a split smaller than a batch.
class TrainLoader:
    """The minibatches of a run: item t holds one `Batch` of every environment of `envs` for step t.

    Images are drawn with replacement from split `in`, as by DomainBed's InfiniteDataLoader, so that a split may be
    smaller than a batch. `class_balanced` draws every class equally often. `unlabeled` draws from split `uda` without
    augmentation, as DomainBed's domain adaptation. `pin` puts batches in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        environments: Sequence[ImageViews],
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
        self.augmentation, self.pin = "none" if unlabeled else preprocess.augmentation, pin
        self.indices = {env: np.asarray(splits[env].get(split, ()), np.int64) for env in envs}
        for env, indices in self.indices.items():
            if not len(indices):
                raise UsageError(
                    f"environment {env}: none of its {len(environments[env])} images is in split {split!r}; {advice}"
                )
        balanced = class_balanced and not unlabeled
        self.probabilities = {env: self._balance_classes(env) if balanced else None for env in envs}

    def _balance_classes(self, env: int) -> np.ndarray:
        """Return the probability of every image by which all classes are equally likely, as DomainBed's lib/misc.py."""
        labels = self.environments[env].labels[self.indices[env]]
        _, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
        return 1 / (len(counts) * counts[class_of])

    def __getitem__(self, t: int) -> list[Batch]:
        return [self.make_minibatch(env, t) for env in self.envs]

    def make_minibatch(self, env: int, t: int) -> Batch:
        """Return the minibatch of environment `env` for step `t`."""
        views, indices = self.environments[env], self.indices[env]
        chosen = rng(self.seed, "batch", env, t).choice(indices, self.batch_size, p=self.probabilities[env])
        images, draws = self._load_images(views, chosen.tolist(), rng(self.seed, "augment", env, t))
        labels = torch.from_numpy(views.labels[chosen])
        if self.pin:
            images, labels = images.pin_memory(), labels.pin_memory()
        return Batch(images, labels, draws)

    def _load_images(
        self, views: ImageViews, chosen: list[int], random: np.random.Generator
    ) -> tuple[Tensor, Draws | None]:
        """Return the images with the indices `chosen`, padded to one size, and the augmentation drawn for them."""
        if self.augmentation == "none":
            return torch.from_numpy(np.stack([views.load_evaluation_view(i) for i in chosen])), None
        images = [views.load_training_view(i) for i in chosen]
        sizes = np.array([image.shape[:2] for image in images])  # (B, 2)
        padded = np.empty((len(images), *sizes.max(axis=0), 3), np.uint8)  # (B, H, W, 3)
        for target, image in zip(padded, images, strict=True):
            target[: image.shape[0], : image.shape[1]] = image
        return torch.from_numpy(padded), draw_augmentation(sizes, self.augmentation, random)


# DEVIATION: DomainBed scores the `out` splits of training environments on augmented images.
class EvalLoader:
    """Batches of the images with the given indices, in their order, not augmented."""

    def __init__(
        self,
        views: ImageViews,
        indices: Sequence[int],
        batch_size: int,
        threads: ThreadPool | None = None,
        *,
        pin: bool = False,
    ) -> None:
        self.views, self.indices, self.batch_size = views, np.asarray(indices, np.int64), batch_size
        self.threads, self.pin = threads or ThreadPool(0), pin

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        chosen = self.indices[k * self.batch_size : (k + 1) * self.batch_size]
        images = torch.from_numpy(np.stack([self.views.load_evaluation_view(i) for i in chosen.tolist()]))
        return Batch(images.pin_memory() if self.pin else images, torch.from_numpy(self.views.labels[chosen]))

    def __iter__(self) -> Iterator[Batch]:
        return self.threads.map(self.__getitem__, range(len(self)))


def make_eval_loaders(
    environments: Sequence[ImageViews],
    splits: Splits,
    batch_size: int,
    threads: ThreadPool | None = None,
    *,
    max_images: int | None = None,
    pin: bool = False,
) -> dict[str, EvalLoader]:
    """Return one loader for every split that is not empty, under the names "env0_in", "env0_out", ...

    `max_images` takes only the first images of a split, which are a random choice, since splits are permuted.
    """
    return {
        f"env{env_i}_{name}": EvalLoader(environments[env_i], indices[:max_images], batch_size, threads, pin=pin)
        for env_i, split in enumerate(splits)
        for name, indices in split.items()
        if len(indices)
    }
