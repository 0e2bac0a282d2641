"""A cache of the image features of frozen towers: computed once, then read by every job that needs the same ones.

`<cache>/features/<key>/` holds `env0.npy`, `env1.npy`, ..., float32 (N, E) in the order of the data set, and
`about.json`: the facts that the key is a digest of, and the digest of every file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm
from domainbed_hp.datasets.loading.loader import EvalLoader
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.prepared import index
from domainbed_hp.datasets.spec import ImageViews
from domainbed_hp.files import cache_dir, sha256_of
from domainbed_hp.networks.clip import find_clip
from domainbed_hp.training.setup import RunSetup

FORMAT = 1
"""Version of the files and of the features in them. Raise it when `VisionTower` computes other features."""
ABOUT = "about.json"
MAX_RATIO = 4
"""Largest size of a data set whose features are computed, over the number of images that the run would encode."""


class DamagedFeatures(OSError):
    """Files of features that have other digests than were written, or cannot be read."""


@dataclass(frozen=True)
class FeatureViews:
    """The `ImageViews` of one environment whose images are features, float32 (E,)."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load_training_view(self, i: int) -> np.ndarray:
        raise TypeError("features cannot be augmented")

    def load_evaluation_view(self, i: int) -> np.ndarray:
        view: np.ndarray = self.features[i]
        return view

    def fingerprint(self) -> str:
        return ""


class FeatureCache:
    """The features of one run's environments, made by `algorithm`.

    The caller has put the algorithm in evaluation mode, without gradients and in the precision of the run.
    """

    def __init__(self, run: RunSetup, algorithm: ClipAlgorithm, batch_size: int, threads: ThreadPool) -> None:
        self.run, self.algorithm, self.batch_size, self.threads = run, algorithm, batch_size, threads
        self.key = self._make_key()
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache_dir() / "features" / name

    def _make_key(self) -> dict[str, Any]:
        """Return all facts that the features depend on, as plain values."""
        run = self.run
        config = find_clip(run.hparams["clip_model"], run.hparams["clip_pretrained"]).model_cfg
        return {
            "format": [FORMAT, index.FORMAT],
            "weights": hash_weights(self.algorithm.tower),
            "tower": {"vision_cfg": config["vision_cfg"], "quick_gelu": config.get("quick_gelu", False)},
            "input_norm": run.hparams["input_norm"],
            "size": run.preprocess.size,
            "resize": run.preprocess.resize,
            "interpolation": run.preprocess.interpolation,
            "dataset": run.args.dataset,
            "files": [views.fingerprint() for views in run.dataset.environments],
            "precision": run.args.precision,
            "device": run.device.type,
        }

    def read_or_compute(self) -> list[np.ndarray] | None:
        """Return the features; None if they do not exist and the run would encode too few images to compute all.

        Of several jobs that need the same features, one computes them and the others wait.
        """
        import filelock

        with contextlib.suppress(FileNotFoundError, DamagedFeatures):
            return read_features(self.folder)
        images = sum(map(len, self.run.dataset.environments))
        if images > MAX_RATIO * count_encoded_images(self.run):
            print(f"Features: not cached; this run needs few of the {images} images and encodes them in each batch")
            return None
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"Features: {images} images are encoded once and stored, for all runs (not with --features encode)")
        with filelock.FileLock(f"{self.folder}.lock"):
            try:
                return read_features(self.folder)
            except FileNotFoundError:
                pass
            except DamagedFeatures as damage:
                print(f"{self.folder} is damaged and computed again: {damage}", file=sys.stderr)
            temporary = self.folder.with_name(f"{self.folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # a killed job may have left it
            try:
                temporary.mkdir()
                self.write(temporary)
                shutil.rmtree(self.folder, ignore_errors=True)
                os.replace(temporary, self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return read_features(self.folder)

    def write(self, folder: Path) -> None:
        """Write the features of all images, also of those in no split, and `about.json` last."""
        environments = self.run.dataset.environments
        digests = {}
        with tqdm(total=sum(map(len, environments)), disable=None, desc="image features", unit="image") as bar:
            for i, views in enumerate(environments):
                path = folder / f"env{i}.npy"
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(views), self.algorithm.tower.embed_dim)}
                with open(path, "wb") as file:  # not a memory map, with which a full disk kills the process
                    np.lib.format.write_array_header_1_0(file, header)
                    for features in self.encode_images(views):
                        file.write(features.astype("<f4").tobytes())
                        bar.update(len(features))
                digests[path.name] = sha256_of(path)
        (folder / ABOUT).write_text(json.dumps({"key": self.key, "sha256": digests}, indent=1) + "\n")
        if self.run.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.run.device)  # `mem_gb` of records is the memory of training

    def encode_images(self, views: ImageViews) -> Iterator[np.ndarray]:
        """Yield batches of features of all images, in order; if a GPU runs out of memory, halve the batch size."""
        run, batch_size, done = self.run, self.batch_size, 0
        while done < len(views):
            loader = EvalLoader(views, range(done, len(views)), batch_size, self.threads, pin=run.on_gpu)
            try:
                for batch in loader:
                    features = self.algorithm.encode(batch.to(run.device, run.preprocess)[0]).cpu().numpy()
                    done += len(features)
                    yield features
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
            batch_size //= 2


def load_features(run: RunSetup, algorithm: Algorithm, batch_size: int, threads: ThreadPool) -> list[ImageViews] | None:
    """Return the environments of a run as features, from the cache or computed by `algorithm` (see `FeatureCache`).

    None if the features change in training, the images have no fingerprint, or the cache is off or not writable.
    """
    # A class with its own `encode` may depend on facts that are not in the key.
    if not isinstance(algorithm, ClipAlgorithm) or type(algorithm).encode is not ClipAlgorithm.encode:
        return None
    if run.args.features == "encode" or not run.algorithm.has_frozen_features(run.hparams):
        return None
    # A subclass may have unfrozen a tower that its parent class declares frozen.
    if any(p.requires_grad for p in algorithm.tower.parameters()) or algorithm.tower.prompt_tokens():
        return None
    cache = FeatureCache(run, algorithm, batch_size, threads)
    if not all(cache.key["files"]):
        return None
    try:
        arrays = cache.read_or_compute()
    except OSError as error:
        print(f"{cache.folder}: features cannot be written there ({error}); every batch is encoded", file=sys.stderr)
        return None
    if arrays is None:
        return None
    print(f"Features: {cache.folder}")
    return [FeatureViews(array, views.labels) for array, views in zip(arrays, run.dataset.environments, strict=True)]


def hash_weights(module: nn.Module) -> str:
    """Return a digest of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_features(folder: Path) -> list[np.ndarray]:
    """Return the features in a folder as memory maps; raise `FileNotFoundError` or `DamagedFeatures`."""
    about = (folder / ABOUT).read_bytes()
    arrays = []
    try:
        for name, sha256 in json.loads(about)["sha256"].items():
            if sha256_of(folder / name) != sha256:
                raise DamagedFeatures(f"{name} has another digest than {ABOUT} says")
            arrays.append(np.asarray(np.load(folder / name, mmap_mode="r")))  # rows of a plain array are read faster
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedFeatures(str(error)) from error
    return arrays


def count_encoded_images(run: RunSetup) -> int:
    """Return how many images a run encodes without cached features; an image counts every time it is encoded."""
    scored = sum(len(indices[: run.args.eval_images]) for split in run.scored_splits for indices in split.values())
    records = -(-run.steps // run.checkpoint_freq)
    return scored * records + run.steps * int(run.hparams["batch_size"]) * len(run.train_envs)
