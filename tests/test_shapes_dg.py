"""ShapesDG: the same bytes everywhere, misleading colours in every environment, drawn once."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from domainbed_hp.datasets import shapes_dg
from domainbed_hp.datasets.shapes_dg import CLASS_NAMES, ENVIRONMENTS, PER_CLASS, SHAPES_DG, SHIFTS
from domainbed_hp.datasets.spec import open_dataset


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return {env: shapes_dg.draw_environment(env) for env in ENVIRONMENTS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINBED_HP_CACHE", str(tmp_path))
    return tmp_path


def hue_features(images: np.ndarray) -> np.ndarray:
    """Mean colour direction of the border and of the whole image, brightness removed."""
    x = images.astype(np.float64) / 255
    border = np.concatenate([x[:, :6].reshape(len(x), -1, 3), x[:, -6:].reshape(len(x), -1, 3)], axis=1).mean(1)
    chroma = x - x.mean(-1, keepdims=True)
    strong = (chroma * np.abs(chroma).sum(-1, keepdims=True) ** 2).sum((1, 2))
    border = border - border.mean(-1, keepdims=True)
    unit = [v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-9) for v in (border, strong)]
    return np.concatenate(unit, axis=1)


def nearest_class(train: np.ndarray, train_y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Majority of the 15 nearest neighbours."""
    near = np.argsort(((test[:, None] - train[None]) ** 2).sum(-1), axis=1)[:, :15]
    return np.array([np.bincount(votes, minlength=len(CLASS_NAMES)).argmax() for votes in train_y[near]])


def test_two_processes_draw_the_same_bytes(arrays):
    code = (
        "import hashlib; from domainbed_hp.datasets.shapes_dg import draw_environment as d;"
        "print(hashlib.sha256(d('A').tobytes() + d('S').tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(arrays["A"].tobytes() + arrays["S"].tobytes()).hexdigest()


def test_counts_and_classes(arrays):
    assert tuple(sorted(CLASS_NAMES)) == SHAPES_DG.class_names
    assert SHAPES_DG.image_counts == tuple(len(arrays[env]) for env in ENVIRONMENTS)
    for array in arrays.values():
        assert array.shape == (SHAPES_DG.num_classes * PER_CLASS, SHAPES_DG.image_size, SHAPES_DG.image_size, 3)
        assert len({image.tobytes() for image in array}) == len(array)


def test_shifts_disagree_everywhere():
    assert len({shift % len(CLASS_NAMES) for shift in SHIFTS.values()}) == len(ENVIRONMENTS)


def test_colour_tells_the_class_inside_an_environment_and_misleads_outside(arrays):
    labels = np.repeat(np.arange(len(CLASS_NAMES)), PER_CLASS)
    even = np.arange(len(labels)) % 2 == 0
    features = {env: hue_features(array) for env, array in arrays.items()}
    for env in ENVIRONMENTS:
        guess = nearest_class(features[env][even], labels[even], features[env][~even])
        assert (guess == labels[~even]).mean() > 0.3, env  # chance is 0.1
    for env, other in (("A", "P"), ("P", "A"), ("P", "S"), ("S", "A")):
        guess = nearest_class(features[env][even], labels[even], features[other])
        assert (guess == labels).mean() < 0.15, (env, other)


def test_second_opening_reads_the_cache(cache, monkeypatch):
    first = open_dataset(SHAPES_DG, None)
    assert first.class_names == CLASS_NAMES and [len(e) for e in first.environments] == list(SHAPES_DG.image_counts)
    image = first.environments[0][0]
    assert image.size == (64, 64) and image.mode == "RGB"
    monkeypatch.setattr(shapes_dg, "draw_environment", lambda env: pytest.fail("drawn twice"))
    second = open_dataset(SHAPES_DG, None)
    assert np.array_equal(np.asarray(second.environments[3][7]), np.asarray(first.environments[3][7]))
    assert sorted(p.suffix for p in cache.iterdir() if p.suffix != ".lock") == [".npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_is_drawn_again(cache, monkeypatch, arrays, damage):
    monkeypatch.setattr(shapes_dg, "draw_environment", lambda env: arrays[env])
    shapes_dg.build()
    path = shapes_dg.cache_path()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"cut": bytes(content[:1000]), "flipped": bytes(content), "empty": b""}[damage])
    assert shapes_dg.cached(path) is None
    shapes_dg.build()
    again = shapes_dg.cached(path)
    assert again is not None and all(np.array_equal(again[env], arrays[env]) for env in ENVIRONMENTS)


def test_reading_the_facts_imports_neither_torch_nor_pillow():
    code = "import sys, domainbed_hp.datasets.shapes_dg; print({'torch', 'PIL'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
