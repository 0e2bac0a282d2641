"""ShapesDG: ten things in four styles, drawn from a seed, so that every command runs with nothing to download.

Adaptation has to learn two things, the same in every environment. Four classes have names that the embedded CLIP has
never read, as class names of real data sets are not always the words of captions. And poses vary a little more than in
the plain half of its training images.

In every environment a colour predicts the class, and misleads in the other environments: with probability `CUE` its hue
is number (class + shift) of `HUES`, with a shift per environment, and otherwise any hue. In the cartoons this is the
colour of the thing, in the other environments that of the ground.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed_hp.datasets.spec import ArrayImages, DatasetSpec, Images
from domainbed_hp.files import cache_dir
from domainbed_hp.seeds import rng

if TYPE_CHECKING:
    from domainbed_hp.datasets.shapes.drawings import Look

THINGS = {  # class name -> name of the drawn thing
    "blossom": "flower",
    "boat": "boat",
    "car": "car",
    "cottage": "house",
    "fish": "fish",
    "guitar": "guitar",
    "key": "key",
    "mug": "cup",
    "mushroom": "mushroom",
    "parasol": "umbrella",
}
CLASS_NAMES = tuple(THINGS)
ENVIRONMENTS = ("A", "C", "P", "S")
SHIFTS = {"A": 0, "C": 3, "P": 5, "S": 8}
PER_CLASS = 60
CUE = 0.8


def make_looks() -> dict[str, "Look"]:
    """Return the style of every environment."""
    from domainbed_hp.datasets.shapes.drawings import Look

    pose: dict[str, Any] = {"size": (0.4, 0.75), "angle": 25, "stretch": 0.2, "clutter": 4}
    return {
        "A": Look("painting", grain=(0, 0.03), **pose),
        "C": Look("cartoon", line=(1.0, 1.8), grain=(0, 0), **pose),
        "P": Look("photo", grain=(0.03, 0.08), **pose),
        "S": Look("sketch", line=(0.6, 1.2), wobble=0.7, dark_ground=0, grain=(0, 0.03), **pose),
    }


def draw_environment(env: str, per_class: int = PER_CLASS) -> np.ndarray:
    """Draw (classes * per_class, 64, 64, 3) uint8, class by class; an image depends only on (env, class, number)."""
    from domainbed_hp.datasets.shapes.drawings import HUES, draw_thing

    hues, look = list(HUES.values()), make_looks()[env]
    images = []
    for class_i, (name, thing) in enumerate(THINGS.items()):
        for i in range(per_class):
            random = rng("ShapesDG", env, name, i)
            cue_i = class_i + SHIFTS[env] if random.random() < CUE else random.integers(len(hues))
            cue, other = hues[int(cue_i) % len(hues)], random.random()
            images.append(draw_thing(random, thing, look, *((cue, other) if env == "C" else (other, cue))))
    return np.stack(images)


def cache_path() -> Path:
    """Return the path of the drawings in the cache folder; its name has a digest of the code that draws."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("polygons.py", "drawings.py", "shapes_dg.py"))
    return cache_dir() / f"shapes_dg-{hashlib.sha256(code).hexdigest()[:12]}.npz"


def load_drawings(path: Path) -> dict[str, np.ndarray] | None:
    """Load the drawings; None where the file is missing or damaged (a .npz has checksums)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {env: stored[env] for env in ENVIRONMENTS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def build() -> list[Images]:
    """Make the images of all environments: drawn once, even if several jobs ask, then read from the cache."""
    import filelock

    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        arrays = load_drawings(path)
        if arrays is None:
            arrays = {env: draw_environment(env) for env in ENVIRONMENTS}
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **arrays)  # type: ignore[arg-type]
            partial.replace(path)
    labels = np.repeat(np.arange(len(CLASS_NAMES)), PER_CLASS)
    return [ArrayImages(arrays[env], labels) for env in ENVIRONMENTS]


SHAPES_DG = DatasetSpec(
    name="ShapesDG",
    environments=ENVIRONMENTS,
    num_classes=len(CLASS_NAMES),
    class_names=CLASS_NAMES,
    image_counts=(len(CLASS_NAMES) * PER_CLASS,) * len(ENVIRONMENTS),
    image_size=64,
    steps=301,
    checkpoint_freq=50,
    build=build,
)
