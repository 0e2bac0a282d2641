"""ShapesDG: the same bytes everywhere, misleading colours in every environment, drawn once."""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from domainbed_hp.datasets.open import open_dataset
from domainbed_hp.datasets.shapes import shapes_dg
from domainbed_hp.datasets.shapes.shapes_dg import CLASS_NAMES, ENVIRONMENTS, PER_CLASS, SHAPES_DG, SHIFTS
from domainbed_hp.networks.preprocess import Preprocess


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return {env: shapes_dg.draw_environment(env) for env in ENVIRONMENTS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINBED_HP_CACHE", str(tmp_path))
    return tmp_path


def hue_counts(images: np.ndarray) -> np.ndarray:
    """(N, 24): the shares of 12 hues on the border, and among what differs from the border."""
    x = images.astype(np.float64) / 255
    top, low = x.max(-1), x.min(-1)
    r, g, b = np.moveaxis(x, -1, 0)
    hue = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi) % 1
    border = np.ones(x.shape[1:3], bool)
    border[10:-10, 10:-10] = False
    ground = np.median(x[:, border], axis=1)[:, None, None]
    other = np.abs(x - ground).max(-1) > 0.25
    bins = np.minimum((hue * 12).astype(int), 11)
    counts = [((top - low) * (bins == k) * where).sum((1, 2)) for where in (border, other) for k in range(12)]
    both = np.stack(counts, axis=1).reshape(len(x), 2, 12)
    return (both / (both.sum(-1, keepdims=True) + 1e-9)).reshape(len(x), 24)


def nearest_mean(train: np.ndarray, train_y: np.ndarray, test: np.ndarray) -> np.ndarray:
    means = np.stack([train[train_y == k].mean(0) for k in range(len(CLASS_NAMES))])
    return ((test[:, None] - means[None]) ** 2).sum(-1).argmin(1)


def test_two_processes_draw_the_same_bytes(arrays):
    draw = shapes_dg.draw_environment
    code = (
        "import hashlib; from domainbed_hp.datasets.shapes.shapes_dg import draw_environment as d;"
        "print(hashlib.sha256(d('A', 3).tobytes() + d('S', 3).tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(draw("A", 3).tobytes() + draw("S", 3).tobytes()).hexdigest()
    assert np.array_equal(arrays["C"][0], draw("C", 1)[0])


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
    features = {env: hue_counts(array) for env, array in arrays.items()}
    for env in ENVIRONMENTS:
        for other in ENVIRONMENTS:
            guess = nearest_mean(features[env][even], labels[even], features[other][~even])
            accuracy = (guess == labels[~even]).mean()  # chance is 0.1
            assert accuracy > 0.6 if other == env else accuracy < 0.2, (env, other, accuracy)


def test_second_opening_reads_the_cache(cache, monkeypatch, arrays):
    monkeypatch.setattr(shapes_dg, "draw_environment", lambda env: arrays[env])
    opened = open_dataset(SHAPES_DG, None, Preprocess(64))
    assert opened.class_names == CLASS_NAMES and [len(e) for e in opened.environments] == list(SHAPES_DG.image_counts)
    first = SHAPES_DG.build()
    image = first[0][0]
    assert image.size == (64, 64) and image.mode == "RGB"
    monkeypatch.setattr(shapes_dg, "draw_environment", lambda env: pytest.fail("drawn twice"))
    assert np.array_equal(np.asarray(SHAPES_DG.build()[3][7]), np.asarray(first[3][7]))
    assert sorted(p.suffix for p in cache.iterdir() if p.suffix != ".lock") == [".npz"]


def test_jobs_that_start_together_draw_once(cache, monkeypatch, arrays):
    drawn: list[str] = []

    def slowly(env: str) -> np.ndarray:
        drawn.append(env)
        time.sleep(0.05)
        return arrays[env]

    monkeypatch.setattr(shapes_dg, "draw_environment", slowly)
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: shapes_dg.build(), range(2)))
    assert drawn == list(ENVIRONMENTS)
    assert np.array_equal(np.asarray(both[0][1][5]), np.asarray(both[1][1][5]))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_cache_is_drawn_again(cache, monkeypatch, arrays, damage):
    monkeypatch.setattr(shapes_dg, "draw_environment", lambda env: arrays[env])
    shapes_dg.build()
    path = shapes_dg.cache_path()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"cut": bytes(content[:1000]), "flipped": bytes(content), "empty": b""}[damage])
    assert shapes_dg.load_drawings(path) is None
    shapes_dg.build()
    again = shapes_dg.load_drawings(path)
    assert again is not None and all(np.array_equal(again[env], arrays[env]) for env in ENVIRONMENTS)


def test_reading_the_facts_imports_neither_torch_nor_pillow():
    code = "import sys, domainbed_hp.datasets.shapes.shapes_dg; print({'torch', 'PIL'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
