"""Runs on cached features, and what is drawn for them."""

import json
from pathlib import Path
from typing import Any

import pytest

from domainbed_hp import records
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training import feature_cache
from domainbed_hp.training.evaluation import evaluation_mode
from domainbed_hp.training.loop import train
from domainbed_hp.training.model_io import build_algorithm
from domainbed_hp.training.setup import set_up_run

CLIP = {"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 2}
IMAGES = 60


def args(folder: Path, data: Path, **settings: Any) -> RunArgs:
    hparams = CLIP | settings.pop("hparams", {})
    settings = {"dataset": "folder:mine", "algorithm": "FrozenCLIP", "steps": 3, "checkpoint_freq": 1} | settings
    return RunArgs(output_dir=str(folder), data_dir=str(data), hparams=json.dumps(hparams), **settings)


def go(folder: Path, data: Path, **settings: Any) -> list[dict[str, Any]]:
    """A short run; its records, without what no two runs share."""
    train(args(folder, data, **settings))
    result = list(records.read_records(folder))
    for record in result:
        del record["step_time"], record["elapsed_s"], record["args"]
    return result


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """The same accuracies, and the same losses to 1e-4."""
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, abs=1e-4) if name in ("ce", "val_loss") else value), name


def folders(feature_cache: Path) -> set[str]:
    return {path.name for path in feature_cache.iterdir() if path.is_dir()}


def computed(data: Path, **settings: Any) -> list[Any]:
    """The environments of a run as features, without training."""
    run = set_up_run(args(Path("not_written"), data, **settings))
    algorithm = build_algorithm(run.model_spec)
    with evaluation_mode(algorithm), ThreadPool(0) as workers:
        result = feature_cache.load_features(run, algorithm, 16, workers)
    return result or []
