"""Features of a frozen tower: the same training as on images, computed once, believed only while they fit."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from domainbed_hp import features, keep, records
from domainbed_hp.algorithms.base import Pixels
from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm, trainable
from domainbed_hp.algorithms.frozen_clip import FrozenCLIP
from domainbed_hp.datasets.loader import Batch, EvalLoader, TrainSteps
from domainbed_hp.datasets.prefetch import Workers
from domainbed_hp.datasets.shapes_dg import CLASS_NAMES, draw_environment
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.datasets.views import Decoded
from domainbed_hp.models import build
from domainbed_hp.networks.clip import MINI
from domainbed_hp.networks.vit import VisionTower
from domainbed_hp.planning import RunArgs, plan
from domainbed_hp.registry import UsageError
from domainbed_hp.scoring import evaluation
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.scripts.train import parser
from domainbed_hp.sweep import CHOICES, Row, SweepSpec, make_jobs
from domainbed_hp.training import train

CLIP = {"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 2}
IMAGES = 60


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each class of ShapesDG in three environments."""
    folder = tmp_path_factory.mktemp("drawn")
    for env in "ACS":
        for i, image in enumerate(draw_environment(env, 2)):
            path = folder / "mine" / env / CLASS_NAMES[i // 2] / f"{i % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINBED_HP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each batch that a tower encoded."""
    sizes: list[int] = []
    forward = VisionTower.forward

    def counting(self: VisionTower, x: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(VisionTower, "forward", counting)
    return sizes


def args(folder: Path, data: Path, **settings: Any) -> RunArgs:
    hparams = CLIP | settings.pop("hparams", {})
    settings = {"dataset": "folder:mine", "algorithm": "FrozenCLIP", "steps": 3, "checkpoint_freq": 1} | settings
    return RunArgs(output_dir=str(folder), data_dir=str(data), hparams=json.dumps(hparams), **settings)


def go(folder: Path, data: Path, **settings: Any) -> list[dict[str, Any]]:
    """A short run; its records, without what no two runs share."""
    train(args(folder, data, **settings))
    found = records.load_run(folder)
    for record in found:
        del record["step_time"], record["elapsed_s"], record["args"]
    return found


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """The same accuracies, and the same losses to 1e-4."""
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, abs=1e-4) if name in ("ce", "val_loss") else value), name


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "rate"),
    [("random", 0.01), pytest.param("coop", 0.005, marks=SLOW), pytest.param("from_text", 0.0003, marks=SLOW)],
)
def test_training_on_features_is_training_on_images(
    drawn: Path,
    tmp_path: Path,
    cache: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    rate: float,
) -> None:
    update, losses = ClipAlgorithm.update, []

    def noting(*rest: Any) -> dict[str, float]:
        losses.append(update(*rest)["ce"])
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
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int], algorithm: str, prompt: str
) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "hparams": {"prompt": prompt}, "eval_images": 3}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert sum(encoded) == IMAGES
    same(cached, go(tmp_path / "encode", drawn, features="encode", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["random", "coop", "from_text"])
def test_all_of_shapes_dg(tmp_path: Path, cache: Path, prompt: str) -> None:
    settings: dict[str, Any] = {"hparams": {"prompt": prompt, "batch_size": 12}, "dataset": "ShapesDG", "steps": 50}
    settings |= {"checkpoint_freq": 25}
    same(*[go(tmp_path / how, tmp_path, features=how, **settings) for how in ("cached", "encode")])


def test_augmented_images_are_encoded_and_scored_ones_are_not(
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int]
) -> None:
    settings: dict[str, Any] = {"hparams": {"augmentation": "crop_flip"}, "test_envs": (1,)}
    cached = go(tmp_path / "cached", drawn, **settings)
    assert encoded == [20, 20, 20, 4, 4, 4]  # three environments, then three steps on two of them
    same(cached, go(tmp_path / "encode", drawn, features="encode", **settings))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_shot_clip_is_cached(drawn: Path, tmp_path: Path, cache: Path, encoded: list[int], precision: str) -> None:
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
    drawn: Path, tmp_path: Path, cache: Path, algorithm: str, hparams: dict[str, Any]
) -> None:
    hparams = hparams | ({"backbone": "clip"} if algorithm == "ERM" else {})
    go(tmp_path / "run", drawn, algorithm=algorithm, hparams=hparams, steps=1, eval_images=1)
    assert not cache.exists()


def test_an_encode_of_its_own_is_not_cached(
    drawn: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainbed_hp.algorithms.frozen_clip import FrozenCLIP

    encode = ClipAlgorithm.encode
    monkeypatch.setattr(FrozenCLIP, "encode", lambda self, x, *rest: encode(self, x, *rest) * 2)
    go(tmp_path / "run", drawn, steps=1, eval_images=1)
    assert not cache.exists()


def computed(data: Path, **settings: Any) -> list[Any]:
    """The environments of a run as features, without training."""
    run = plan(args(Path("not_written"), data, **settings))
    algorithm = build(run.recipe)
    with evaluation(algorithm), Workers(0) as workers:
        found = features.cached_features(run, algorithm, 16, workers)
    return found or []


def test_features_are_those_of_the_images_in_order(drawn: Path, tmp_path: Path, cache: Path) -> None:
    run = plan(args(tmp_path / "run", drawn))
    algorithm = build(run.recipe).eval()
    for views, images in zip(computed(drawn), run.dataset.environments, strict=True):
        assert (views.labels == images.labels).all() and len(views) == len(images) == 20
        for i in (0, 7, 19):
            x = torch.from_numpy(images.evaluation(i))[None].float() / 255
            assert np.allclose(views.evaluation(i), algorithm.encode(x)[0].detach(), atol=1e-4)
            assert views.evaluation(i).dtype == np.float32


def test_batches_of_features_are_not_scaled(drawn: Path, cache: Path) -> None:
    (views, *_), pixels = computed(drawn), plan(args(Path("x"), drawn)).pixels
    x, y = EvalLoader(views, [3, 1, 2], 3)[0].to(torch.device("cpu"), pixels)
    assert torch.equal(x, torch.from_numpy(np.array(views.features[[3, 1, 2]]))) and y.tolist() == [1, 0, 1]
    batch = TrainSteps([views], [{"in": [5]}], [0], 2, pixels, seed=0)[0][0]
    assert isinstance(batch, Batch) and torch.equal(batch.images[0], torch.from_numpy(np.array(views.features[5])))
    with pytest.raises(TypeError, match="cannot be augmented"):
        views.training(0)


def test_anything_that_changes_the_features_changes_the_key(
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)  # keeps names, sizes and times of modification, as other images may have them
    computed(drawn)
    known = folders(cache)
    assert len(known) == 1
    encoded.clear()
    computed(drawn)
    assert folders(cache) == known and not encoded

    def is_new(what: str, **settings: Any) -> None:
        computed(data, **settings)
        assert len(folders(cache)) == len(known) + 1, what
        known.update(folders(cache))

    is_new("a copy")
    image = data / "mine" / "A" / "boat" / "0.png"
    before = image.read_bytes()
    with Image.open(image) as old:
        old.rotate(90).save(image)
    is_new("a changed image")
    image.write_bytes(before)
    os.utime(image, ns=(1, 1))
    is_new("another time")
    shutil.copy(image, image.with_name("2.png"))
    is_new("an added image")
    (data / "mine" / "C" / "car" / "0.png").unlink()
    is_new("a removed image")
    moved = data / "mine" / "C" / "key" / "1.png"
    moved.rename(data / "mine" / "C" / "mug" / "7.png")
    is_new("another label")
    is_new("input_norm", hparams={"input_norm": "imagenet"})
    is_new("precision", precision="bf16")

    weights = load_file(MINI / "open_clip_model.safetensors")
    path = tmp_path / "clip.safetensors"
    save_file(weights, path)
    before_weights = len(known)
    computed(data, hparams={"clip_pretrained": str(path)})
    assert len(folders(cache)) == before_weights, "the same weights from another file"
    weights["visual.proj"][0, 0] += 1e-3
    save_file(weights, path)
    is_new("one weight in the same file", hparams={"clip_pretrained": str(path)})

    shutil.copytree(MINI, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    is_new("the activation", hparams={"clip_pretrained": f"local-dir:{tmp_path / 'clip'}"})
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    is_new("the interpolation", hparams={"clip_pretrained": f"local-dir:{tmp_path / 'clip'}"})
    config["preprocess_cfg"]["resize_mode"] = "squash"
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    is_new("the way to a square", hparams={"clip_pretrained": f"local-dir:{tmp_path / 'clip'}"})
    config["preprocess_cfg"]["mean"] = [0.4, 0.4, 0.4]
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    is_new("the normalisation", hparams={"clip_pretrained": f"local-dir:{tmp_path / 'clip'}"})


def test_prepared_data_are_told_apart_by_their_index(drawn: Path, tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    renew = ["--data_dir", str(data), "--dataset", "folder:mine", "--image_size", "64", "--resize", "crop"]
    renew += ["--interpolation", "bicubic", "--encoding", "raw"]
    prepare(renew)
    plain = computed(drawn)
    before = computed(data)
    assert "prepared" in plan(args(tmp_path, data)).dataset.source
    assert all(np.allclose(a.features, b.features, atol=1e-5) for a, b in zip(plain, before, strict=True))
    known = folders(cache)
    computed(data)
    assert folders(cache) == known
    os.utime(data / "mine" / "A" / "boat" / "0.png", ns=(1, 1))
    prepare(renew)
    computed(data)
    assert len(folders(cache)) == len(known) + 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def scramble(path: Path) -> None:
    path.with_name(features.ABOUT).write_bytes(b"\xff")


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, scramble])
def test_damage_is_noticed_and_mended(
    drawn: Path, cache: Path, encoded: list[int], capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    good = [np.array(views.features) for views in computed(drawn)]
    (folder,) = folders(cache)
    damage(cache / folder / "env1.npy")
    capsys.readouterr(), encoded.clear()
    mended = computed(drawn)
    assert sum(encoded) == IMAGES
    assert re.search(f"{folder} is damaged and computed again: .", capsys.readouterr().err)
    assert all((a == b.features).all() for a, b in zip(good, mended, strict=True))
    encoded.clear()
    computed(drawn)
    assert not encoded and not capsys.readouterr().err


CHILD = """
import os, signal, sys, time
from pathlib import Path
from test_features import computed
from domainbed_hp import features
write, encoded = features.write, features.encoded
def slow(*args):
    with open(sys.argv[2], "a") as log:
        log.write("written\\n")
    time.sleep(1)
    write(*args)
def deadly(*args):
    yield from encoded(*args)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "slow":
    features.write = slow
else:
    features.encoded = deadly
print(sum(float(views.features.sum()) for views in computed(Path(sys.argv[1]))))
"""


def child(drawn: Path, log: Path, what: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, drawn, log, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_jobs_that_ask_at_once_compute_once(drawn: Path, tmp_path: Path, cache: Path) -> None:
    jobs = [child(drawn, tmp_path / "log", "slow") for _ in range(2)]
    answers = [job.communicate()[0].splitlines()[-1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and answers[0] == answers[1]
    assert (tmp_path / "log").read_text() == "written\n"


@pytest.mark.slow
def test_a_killed_job_leaves_nothing_that_is_believed(
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int]
) -> None:
    job = child(drawn, tmp_path / "log", "deadly")
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    (left,) = folders(cache)
    assert left.endswith(".tmp") and (cache / left / "env0.npy").exists()
    assert len(computed(drawn)) == 3 and sum(encoded) == IMAGES
    assert folders(cache) == {left.removesuffix(".tmp")}


def test_without_a_place_for_features_every_batch_is_encoded(
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    every = go(tmp_path / "encode", drawn, features="encode", eval_images=1)
    cache.parent.write_text("a file where the folder should be")
    encoded.clear()
    assert go(tmp_path / "run", drawn, eval_images=1) == every and encoded
    assert "every batch is encoded" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = features.encoded

    def full(*rest: Any) -> Iterator[np.ndarray]:
        yield next(encode(*rest))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features, "encoded", full)
    assert computed(drawn) == [] and not folders(cache)
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err


def test_a_read_only_cache_is_read(drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(drawn)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("filelock.FileLock", refused)
    assert len(computed(drawn)) == 3


def test_images_without_a_fingerprint_are_not_cached(drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("domainbed_hp.datasets.folder.FolderImages.fingerprint")
    assert computed(drawn) == [] and not cache.exists()


def test_a_full_gpu_gets_smaller_batches(drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [np.array(views.features) for views in computed(drawn)]
    shutil.rmtree(cache)
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
    drawn: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
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
    drawn: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = features.encoded

    def stopped(*rest: Any) -> Iterator[np.ndarray]:
        yield next(encode(*rest))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patch:
        patch.setattr(features, "encoded", stopped)
        with pytest.raises(SystemExit) as end:
            go(tmp_path / "run", drawn)
    assert end.value.code == 128 + signal.SIGTERM and not folders(cache)
    assert "SIGTERM: stopped before any step; the same command goes on" in capsys.readouterr().out
    assert len(go(tmp_path / "run", drawn)) == 3


def test_a_process_that_keeps_digests_once(drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(drawn)
    monkeypatch.setattr(keep, "keeping", True)
    first = computed(drawn)
    (folder,) = folders(cache)
    flip(cache / folder / "env0.npy")  # who reads again would see it
    assert all(a.features is b.features for a, b in zip(first, computed(drawn), strict=True))


def test_features_of_pacs(shared_data: Path, tmp_path: Path, cache: Path, encoded: list[int]) -> None:
    for folder in (shared_data / "PACS").glob("*/*"):
        target = tmp_path / "PACS" / folder.relative_to(shared_data / "PACS")
        target.mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            (target / path.name).symlink_to(path)
    settings: dict[str, Any] = {"dataset": "PACS", "hparams": {"prompt": "random"}}
    cached = go(tmp_path / "cached", tmp_path, **settings)
    assert sum(encoded) == 4 * 7 * 2
    same(cached, go(tmp_path / "encode", tmp_path, features="encode", **settings))


def test_the_arguments_of_a_run_know_both_ways() -> None:
    default = RunArgs("out").features
    assert default == parser().parse_args([]).features == CHOICES["features"][0]
    assert parser().parse_args(["--features", "encode"]).features == "encode"
    assert replace(RunArgs("out"), features="encode").features in CHOICES["features"]


def test_a_sweep_passes_it_on_and_its_jobs_stay_the_same() -> None:
    spec = SweepSpec("out", ("Debug28",), (Row("FrozenCLIP"),), n_trials=1, n_hparams=1, test_envs=((0,),))
    ((plain,), (encode,)) = (make_jobs(each, each.rows) for each in (spec, replace(spec, features="encode")))
    assert "--features encode" in " ".join(encode.command) and "--features" not in plain.command
    assert encode.folder == plain.folder
    with pytest.raises(UsageError, match="Known: cached, encode"):
        SweepSpec.of({**asdict(spec), "rows": [{"algorithm": "FrozenCLIP"}], "features": "cache"}, "s.toml")


def test_a_short_look_at_many_images_encodes_the_few(
    drawn: Path, tmp_path: Path, cache: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = {"algorithm": "ZeroShotCLIP", "eval_images": 2, "hparams": {"batch_size": 1}}  # 10 images are scored
    monkeypatch.setattr(features, "WORTH", 4)
    few = go(tmp_path / "few", drawn, **look)
    assert not cache.exists() and sum(encoded) < IMAGES
    monkeypatch.setattr(features, "WORTH", 10)
    go(tmp_path / "worth", drawn, **look)
    monkeypatch.setattr(features, "WORTH", 4)
    encoded.clear()
    same(few, go(tmp_path / "there", drawn, **look))
    assert not encoded, "what is there is used"


class Norms(FrozenCLIP):
    """Unfreezes what its parent says is frozen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norms = trainable(p for name, p in self.tower.named_parameters() if "ln_" in name)
        self.train_with({"params": norms, "lr": 1e-3})


def test_a_tower_that_trains_after_all_is_not_cached(drawn: Path, tmp_path: Path, cache: Path) -> None:
    run = plan(args(tmp_path, drawn))
    for kind, cached in ((FrozenCLIP, True), (Norms, False)):
        told = run.hparams | {"class_names": run.dataset.class_names}
        algorithm = kind((3, 64, 64), len(run.dataset.class_names), 2, told)
        with evaluation(algorithm), Workers(0) as workers:
            assert (features.cached_features(run, algorithm, 64, workers) is not None) == cached


def test_images_that_inherit_their_fingerprint_are_not_told_apart_by_it() -> None:
    class Inverted(ArrayImages):
        def __getitem__(self, i: int) -> Image.Image:
            return Image.fromarray(255 - self.array[i])

    array, labels, pixels = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64), Pixels(8)
    assert Decoded(ArrayImages(array, labels), pixels).fingerprint()
    assert Decoded(Inverted(array, labels), pixels).fingerprint() == ""
