"""The cache of image features: computed once, believed only while it fits."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from featured import IMAGES, args, computed, folders, go
from PIL import Image
from safetensors.torch import load_file, save_file

from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.networks.clip import MINI
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.training import feature_cache as features_module
from domainbed_hp.training.setup import set_up_run


def test_anything_that_changes_the_features_changes_the_key(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)  # keeps names, sizes and times of modification, as other images may have them
    computed(drawn)
    known = folders(feature_cache)
    assert len(known) == 1
    encoded.clear()
    computed(drawn)
    assert folders(feature_cache) == known and not encoded

    def is_new(what: str, **settings: Any) -> None:
        computed(data, **settings)
        assert len(folders(feature_cache)) == len(known) + 1, what
        known.update(folders(feature_cache))

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
    assert len(folders(feature_cache)) == before_weights, "the same weights from another file"
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


def test_prepared_data_are_told_apart_by_their_index(drawn: Path, tmp_path: Path, feature_cache: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    renew = ["--data_dir", str(data), "--dataset", "folder:mine", "--image_size", "64", "--resize", "crop"]
    renew += ["--interpolation", "bicubic", "--encoding", "raw"]
    prepare(renew)
    plain = computed(drawn)
    before = computed(data)
    assert "prepared" in set_up_run(args(tmp_path, data)).dataset.source
    assert all(np.allclose(a.features, b.features, atol=1e-5) for a, b in zip(plain, before, strict=True))
    known = folders(feature_cache)
    computed(data)
    assert folders(feature_cache) == known
    os.utime(data / "mine" / "A" / "boat" / "0.png", ns=(1, 1))
    prepare(renew)
    computed(data)
    assert len(folders(feature_cache)) == len(known) + 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def scramble(path: Path) -> None:
    path.with_name(features_module.ABOUT).write_bytes(b"\xff")


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, scramble])
def test_damage_is_noticed_and_mended(
    drawn: Path, feature_cache: Path, encoded: list[int], capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    good = [np.array(views.features) for views in computed(drawn)]
    (folder,) = folders(feature_cache)
    damage(feature_cache / folder / "env1.npy")
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
from featured import computed
from domainbed_hp.training import feature_cache as features_module
cache = features_module.FeatureCache
write, encode_images = cache.write, cache.encode_images
def slow(*args):
    with open(sys.argv[2], "a") as log:
        log.write("written\\n")
    time.sleep(1)
    write(*args)
def deadly(*args):
    yield from encode_images(*args)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "slow":
    cache.write = slow
else:
    cache.encode_images = deadly
print(sum(float(views.features.sum()) for views in computed(Path(sys.argv[1]))))
"""


def child(drawn: Path, log: Path, what: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, drawn, log, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_jobs_that_ask_at_once_compute_once(drawn: Path, tmp_path: Path, feature_cache: Path) -> None:
    jobs = [child(drawn, tmp_path / "log", "slow") for _ in range(2)]
    answers = [job.communicate()[0].splitlines()[-1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and answers[0] == answers[1]
    assert (tmp_path / "log").read_text() == "written\n"


@pytest.mark.slow
def test_a_killed_job_leaves_nothing_that_is_believed(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int]
) -> None:
    job = child(drawn, tmp_path / "log", "deadly")
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    (left,) = folders(feature_cache)
    assert left.endswith(".tmp") and (feature_cache / left / "env0.npy").exists()
    assert len(computed(drawn)) == 3 and sum(encoded) == IMAGES
    assert folders(feature_cache) == {left.removesuffix(".tmp")}


def test_without_a_place_for_features_every_batch_is_encoded(
    drawn: Path, tmp_path: Path, feature_cache: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    every = go(tmp_path / "encode", drawn, features="encode", eval_images=1)
    feature_cache.parent.write_text("a file where the folder should be")
    encoded.clear()
    assert go(tmp_path / "run", drawn, eval_images=1) == every and encoded
    assert "every batch is encoded" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    drawn: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = features_module.FeatureCache.encode_images

    def full(*rest: Any) -> Iterator[np.ndarray]:
        yield next(encode(*rest))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features_module.FeatureCache, "encode_images", full)
    assert computed(drawn) == [] and not folders(feature_cache)
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err


def test_a_read_only_cache_is_read(drawn: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(drawn)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("filelock.FileLock", refused)
    assert len(computed(drawn)) == 3


def test_images_without_a_fingerprint_are_not_cached(
    drawn: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("domainbed_hp.datasets.folder.FolderImages.fingerprint")
    assert computed(drawn) == [] and not feature_cache.exists()


def test_images_that_inherit_their_fingerprint_are_not_told_apart_by_it() -> None:
    class Inverted(ArrayImages):
        def __getitem__(self, i: int) -> Image.Image:
            return Image.fromarray(255 - self.array[i])

    array, labels, preprocess = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64), Preprocess(8)
    assert DecodedViews(ArrayImages(array, labels), preprocess).fingerprint()
    assert DecodedViews(Inverted(array, labels), preprocess).fingerprint() == ""
