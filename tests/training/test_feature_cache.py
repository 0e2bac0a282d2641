"""Features of a frozen tower: the same training as on images."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from featured import IMAGES, args, computed, folders, go, same

from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm, trainable
from domainbed_hp.algorithms.frozen_clip import FrozenCLIP
from domainbed_hp.datasets.loading.loader import Batch, EvalLoader, TrainLoader
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.registry import UsageError
from domainbed_hp.sweep.spec import SweepSpec, make_jobs
from domainbed_hp.training import feature_cache as features_module
from domainbed_hp.training.evaluation import evaluation_mode
from domainbed_hp.training.model_io import build_algorithm
from domainbed_hp.training.setup import set_up_run

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "rate"),
    [("random", 0.01), pytest.param("coop", 0.005, marks=SLOW), pytest.param("from_text", 0.0003, marks=SLOW)],
)
def test_training_on_features_is_training_on_images(
    drawn: Path,
    tmp_path: Path,
    feature_cache: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    rate: float,
) -> None:
    update, losses = ClipAlgorithm.update, []

    def noting(*rest: Any) -> dict[str, float]:
        losses.append(float(update(*rest)["ce"]))
        return {"ce": losses[-1]}

    monkeypatch.setattr(ClipAlgorithm, "update", noting)
    settings: dict[str, Any] = {"hparams": {"prompt": prompt, "prompt_lr": rate}, "steps": 50, "checkpoint_freq": 25}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert sum(encoded) == IMAGES
    every = go(tmp_path / "encode", drawn, features="encode", **settings)
    same(cached, every)
    assert len(losses) == 100 and losses[:50] == pytest.approx(losses[50:], abs=1e-4)
    assert np.mean(losses[25:50]) < 0.95 * np.mean(losses[:25])
    encoded.clear()
    assert go(tmp_path / "again", drawn, **settings) == cached and not encoded


@pytest.mark.parametrize(("algorithm", "prompt"), [("CLIPAdapter", "template"), ("FrozenCLIP", "dpl")])
def test_other_methods_on_features(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int], algorithm: str, prompt: str
) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "hparams": {"prompt": prompt}, "eval_images": 3}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert sum(encoded) == IMAGES
    same(cached, go(tmp_path / "encode", drawn, features="encode", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["random", "coop", "from_text"])
def test_all_of_shapes_dg(tmp_path: Path, feature_cache: Path, prompt: str) -> None:
    settings: dict[str, Any] = {"hparams": {"prompt": prompt, "batch_size": 12}, "dataset": "ShapesDG", "steps": 50}
    settings |= {"checkpoint_freq": 25, "eval_images": 100}
    same(*[go(tmp_path / how, tmp_path, features=how, **settings) for how in ("cached", "encode")])


def test_augmented_images_are_encoded_and_scored_ones_are_not(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int]
) -> None:
    settings: dict[str, Any] = {"hparams": {"augmentation": "crop_flip"}, "test_envs": (1,)}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert encoded == [20, 20, 20, 4, 4, 4]  # three environments, then three steps on two of them
    same(cached, go(tmp_path / "encode", drawn, features="encode", **settings))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_zero_shot_clip_is_cached(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int], precision: str
) -> None:
    settings: dict[str, Any] = {"algorithm": "ZeroShotCLIP", "precision": precision}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert sum(encoded) == IMAGES
    every = go(tmp_path / "encode", drawn, features="encode", **settings)
    if precision == "fp32":
        same(cached, every)
    encoded.clear()
    assert go(tmp_path / "again", drawn, **settings) == cached and not encoded


@pytest.mark.parametrize(
    ("algorithm", "hparams"),
    [("ERM", {}), ("LoRA", {}), ("FineTuneCLIP", {}), ("HeadPurification", {}), ("FrozenCLIP", {"prompt": "maple"})],
)
def test_what_trains_the_tower_is_never_cached(
    drawn: Path, tmp_path: Path, feature_cache: Path, algorithm: str, hparams: dict[str, Any]
) -> None:
    hparams = hparams | ({"backbone": "clip"} if algorithm == "ERM" else {})
    go(tmp_path / "run", drawn, algorithm=algorithm, hparams=hparams, steps=1, eval_images=1)
    assert not feature_cache.exists()


def test_an_encode_of_its_own_is_not_cached(
    drawn: Path, tmp_path: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainbed_hp.algorithms.frozen_clip import FrozenCLIP

    encode = ClipAlgorithm.encode
    monkeypatch.setattr(FrozenCLIP, "encode", lambda self, x, *rest: encode(self, x, *rest) * 2)
    go(tmp_path / "run", drawn, steps=1, eval_images=1)
    assert not feature_cache.exists()


def test_features_are_those_of_the_images_in_order(drawn: Path, tmp_path: Path, feature_cache: Path) -> None:
    run = set_up_run(args(tmp_path / "run", drawn))
    algorithm = build_algorithm(run.model_spec).eval()
    for views, images in zip(computed(drawn), run.dataset.environments, strict=True):
        assert (views.labels == images.labels).all() and len(views) == len(images) == 20
        for i in (0, 7, 19):
            x = torch.from_numpy(images.load_evaluation_view(i))[None].float() / 255
            assert np.allclose(views.load_evaluation_view(i), algorithm.encode(x)[0].detach(), atol=1e-4)
            assert views.load_evaluation_view(i).dtype == np.float32


def test_batches_of_features_are_not_scaled(drawn: Path, feature_cache: Path) -> None:
    (views, *_), preprocess = computed(drawn), set_up_run(args(Path("x"), drawn)).preprocess
    x, y = EvalLoader(views, [3, 1, 2], 3)[0].to(torch.device("cpu"), preprocess)
    assert torch.equal(x, torch.from_numpy(np.array(views.features[[3, 1, 2]]))) and y.tolist() == [1, 0, 1]
    batch = TrainLoader([views], [{"in": [5]}], [0], 2, preprocess, seed=0)[0][0]
    assert isinstance(batch, Batch) and torch.equal(batch.images[0], torch.from_numpy(np.array(views.features[5])))
    with pytest.raises(TypeError, match="cannot be augmented"):
        views.load_training_view(0)


def test_a_full_gpu_gets_smaller_batches(drawn: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [np.array(views.features) for views in computed(drawn)]
    shutil.rmtree(feature_cache)
    encode, sizes = ClipAlgorithm.encode, []

    def small(self: ClipAlgorithm, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x))
        return encode(self, x, *rest)

    monkeypatch.setattr(ClipAlgorithm, "encode", small)
    assert all(np.allclose(a, b.features, atol=1e-5) for a, b in zip(good, computed(drawn), strict=True))
    assert sizes == [4] * 15


def crash(after: int, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, or an error, in the update after so many."""
    update, calls = ClipAlgorithm.update, [0]

    def counting(self: ClipAlgorithm, *rest: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] > after:
            if number is None:
                raise RuntimeError("stopped")
            os.kill(os.getpid(), number)
        return update(self, *rest)

    monkeypatch.setattr(ClipAlgorithm, "update", counting)


def test_a_run_on_features_goes_on_where_it_was(
    drawn: Path, tmp_path: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 5, "checkpoint_freq": 2, "hparams": {"prompt": "random"}}
    whole = go(tmp_path / "whole", drawn, **settings)
    with monkeypatch.context() as patch:
        crash(2, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            go(tmp_path / "run", drawn, **settings)
    assert go(tmp_path / "run", drawn, **settings) == whole
    with monkeypatch.context() as patch:
        crash(3, None, patch)
        with pytest.raises(RuntimeError):
            go(tmp_path / "other", drawn, **settings)
    same(go(tmp_path / "other", drawn, features="encode", **settings), whole)


def test_a_signal_stops_the_computation(
    drawn: Path,
    tmp_path: Path,
    feature_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = features_module.FeatureCache.encode_images

    def stopped(*rest: Any) -> Iterator[np.ndarray]:
        yield next(encode(*rest))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patch:
        patch.setattr(features_module.FeatureCache, "encode_images", stopped)
        with pytest.raises(SystemExit) as end:
            go(tmp_path / "run", drawn)
    assert end.value.code == 128 + signal.SIGTERM and not folders(feature_cache)
    assert "SIGTERM: stopped before any step; the same command resumes the run" in capsys.readouterr().out
    assert len(go(tmp_path / "run", drawn)) == 3


def test_features_of_pacs(shared_data: Path, tmp_path: Path, feature_cache: Path, encoded: list[int]) -> None:
    for folder in (shared_data / "PACS").glob("*/*"):
        target = tmp_path / "PACS" / folder.relative_to(shared_data / "PACS")
        target.mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            (target / path.name).symlink_to(path)
    settings: dict[str, Any] = {"dataset": "PACS", "hparams": {"prompt": "random"}}
    cached = go(tmp_path / "cached", tmp_path, **settings)
    assert sum(encoded) == 4 * 7 * 2
    same(cached, go(tmp_path / "encode", tmp_path, features="encode", **settings))


def test_a_sweep_passes_it_on_and_its_jobs_stay_the_same() -> None:
    values = {"output_dir": "out", "datasets": ["Debug28"], "rows": [{"algorithm": "FrozenCLIP"}]}
    values |= {"n_trials": 1, "n_hparams": 1, "test_envs": [[0]]}
    specs = [SweepSpec.of({**values, **more}, "s.toml") for more in ({}, {"features": "encode"})]
    ((plain,), (encode,)) = (make_jobs(spec, spec.rows) for spec in specs)
    assert "--features encode" in " ".join(encode.command) and "--features" not in plain.command
    assert encode.folder == plain.folder
    with pytest.raises(UsageError, match="Known: cached, encode"):
        SweepSpec.of({**values, "features": "cache"}, "s.toml")


def test_a_short_look_at_many_images_encodes_the_few(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = {"algorithm": "ZeroShotCLIP", "eval_images": 2, "hparams": {"batch_size": 1}}  # 10 images are scored
    monkeypatch.setattr(features_module, "MAX_RATIO", 4)
    few = go(tmp_path / "few", drawn, **look)
    assert not feature_cache.exists() and sum(encoded) < IMAGES
    monkeypatch.setattr(features_module, "MAX_RATIO", 10)
    go(tmp_path / "worth", drawn, **look)
    monkeypatch.setattr(features_module, "MAX_RATIO", 4)
    encoded.clear()
    same(few, go(tmp_path / "there", drawn, **look))
    assert not encoded, "what is there is used"


def test_only_what_is_scored_is_asked_for(drawn: Path, tmp_path: Path) -> None:
    full, fast = (set_up_run(args(tmp_path, drawn, eval=kind)) for kind in ("full", "fast"))
    skipped = sum(len(full.splits[i]["in"]) for i in full.train_envs)
    records = -(-full.steps // full.checkpoint_freq)
    assert (
        skipped
        and features_module.count_encoded_images(full) - features_module.count_encoded_images(fast) == skipped * records
    )


class Norms(FrozenCLIP):
    """Unfreezes what its parent says is frozen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norms = trainable(p for name, p in self.tower.named_parameters() if "ln_" in name)
        self.train_with({"params": norms, "lr": 1e-3})


def test_a_tower_that_trains_after_all_is_not_cached(drawn: Path, tmp_path: Path, feature_cache: Path) -> None:
    run = set_up_run(args(tmp_path, drawn))
    for kind, cached in ((FrozenCLIP, True), (Norms, False)):
        hparams = run.hparams | {"class_names": run.dataset.class_names}
        algorithm = kind((3, 64, 64), len(run.dataset.class_names), 2, hparams)
        with evaluation_mode(algorithm), ThreadPool(0) as workers:
            assert (features_module.load_features(run, algorithm, 64, workers) is not None) == cached
