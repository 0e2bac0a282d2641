"""Image features of a frozen tower: computed once, kept on disk, read by every job that asks for the same.

In `<cache>/features/<key>/` lie `env0.npy`, `env1.npy`, ..., float32 (N, E) in the order of the data set, and
`about.json`: what the key is a digest of, and the digest of each file, without which no file is believed.
"""

from __future__ import annotations

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
from domainbed_hp.datasets.loading.transforms import ImageViews
from domainbed_hp.datasets.prepared import index
from domainbed_hp.files import cache_dir
from domainbed_hp.networks.clip import find_clip
from domainbed_hp.training.setup import Plan

FORMAT = 1
"""Of the files, and of the features in them: another one where `VisionTower` computes something else."""
ABOUT = "about.json"
WORTH = 4
"""Features are computed unless the data set has more than so many times the images that the run will ask for."""


class Damaged(OSError):
    """Features that are not as they were written."""


@dataclass(frozen=True)
class FeatureViews:
    """The `ImageViews` of one environment as features: an image is float32 (E,)."""

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


def cached_features(run: Plan, algorithm: Algorithm, batch_size: int, workers: ThreadPool) -> list[ImageViews] | None:
    """The environments of a run as features, computed by `algorithm` where nobody has yet.

    None where they change, cannot be told from others or cannot be kept, and with `--features encode`. The caller has
    set the algorithm to evaluation, without gradients and in the precision of the run.
    """
    # An `encode` of its own may depend on what the key does not know of.
    if not isinstance(algorithm, ClipAlgorithm) or type(algorithm).encode is not ClipAlgorithm.encode:
        return None
    if run.args.features == "encode" or not run.algorithm.has_frozen_features(run.hparams):
        return None
    # A subclass may have unfrozen what its parent said is frozen.
    if any(p.requires_grad for p in algorithm.tower.parameters()) or algorithm.tower.prompt_tokens():
        return None
    key = ingredients(run, algorithm)
    if not all(key["files"]):
        return None
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "features" / name
    environments = run.dataset.environments
    try:
        arrays = open_or_compute(folder, key, run, algorithm, batch_size, workers)
    except OSError as error:
        print(f"{folder}: cannot keep features there ({error}); every batch is encoded", file=sys.stderr)
        return None
    if arrays is None:
        return None
    print(f"Features: {folder}")
    return [FeatureViews(array, views.labels) for array, views in zip(arrays, environments, strict=True)]


def ingredients(run: Plan, algorithm: ClipAlgorithm) -> dict[str, Any]:
    """All that features depend on, as plain values."""
    config = find_clip(run.hparams["clip_model"], run.hparams["clip_pretrained"]).model_cfg
    return {
        "format": [FORMAT, index.FORMAT],
        "weights": digest(algorithm.tower),
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


def digest(module: nn.Module) -> str:
    """Of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def opened(folder: Path) -> list[np.ndarray]:
    """The features in a folder, mapped; `FileNotFoundError` where there are none, `Damaged`."""
    about = (folder / ABOUT).read_bytes()
    arrays = []
    try:
        for name, sha256 in json.loads(about)["sha256"].items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise Damaged(f"{name} has another digest than {ABOUT} says")
            arrays.append(np.asarray(np.load(folder / name, mmap_mode="r")))  # a plain array: rows of it come quicker
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Damaged(str(error)) from error
    return arrays


def open_or_compute(
    folder: Path, key: dict[str, Any], run: Plan, algorithm: ClipAlgorithm, batch_size: int, workers: ThreadPool
) -> list[np.ndarray] | None:
    """The features in `folder`; of the jobs that find none one computes them and the others wait.

    None where there are none and the run asks for too few to compute all.
    """
    import filelock

    with contextlib.suppress(FileNotFoundError, Damaged):
        return opened(folder)
    images = sum(map(len, run.dataset.environments))
    if images > WORTH * asked(run):
        print(f"Features: none of these {images} images are kept yet; the few of this run are encoded batch by batch")
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Features: {images} images are encoded once, by this job or another (--features encode: each batch anew)")
    with filelock.FileLock(f"{folder}.lock"):
        try:
            return opened(folder)
        except FileNotFoundError:
            pass
        except Damaged as damage:
            print(f"{folder} is damaged and computed again: {damage}", file=sys.stderr)
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a job that was killed
        try:
            temporary.mkdir()
            write(temporary, key, run, algorithm, batch_size, workers)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return opened(folder)


def asked(run: Plan) -> int:
    """How many images a run encodes without features, the same one again and again."""
    limit = run.args.eval_images
    scored = sum(len(indices[:limit]) for split in run.scored for indices in split.values())
    records = -(-run.steps // run.checkpoint_freq)
    batch_size: int = run.hparams["batch_size"]
    return scored * records + run.steps * batch_size * len(run.train_envs)


def write(
    folder: Path, key: dict[str, Any], run: Plan, algorithm: ClipAlgorithm, batch_size: int, workers: ThreadPool
) -> None:
    """Every image of every environment, whether a split holds it or not; `about.json` comes last."""
    environments = run.dataset.environments
    digests = {}
    with tqdm(total=sum(map(len, environments)), disable=None, desc="image features", unit="image") as bar:
        for i, views in enumerate(environments):
            path = folder / f"env{i}.npy"
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(views), algorithm.tower.embed_dim)}
            with open(path, "wb+") as file:  # not mapped: a full disk would kill the process
                np.lib.format.write_array_header_1_0(file, header)
                for features in encoded(views, run, algorithm, batch_size, workers):
                    file.write(features.astype("<f4").tobytes())
                    bar.update(len(features))
                file.seek(0)
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / ABOUT).write_text(json.dumps({"key": key, "sha256": digests}, indent=1) + "\n")
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)  # what records call the memory of the run is not this


def encoded(
    views: ImageViews, run: Plan, algorithm: ClipAlgorithm, batch_size: int, workers: ThreadPool
) -> Iterator[np.ndarray]:
    """Features of all images in order; where a GPU runs out of memory, the rest in batches of half the size."""
    done = 0
    while done < len(views):
        loader = EvalLoader(views, range(done, len(views)), batch_size, workers, pin=run.on_gpu)
        try:
            for batch in loader:
                features = algorithm.encode(batch.to(run.device, run.preprocess)[0]).cpu().numpy()
                done += len(features)
                yield features
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
