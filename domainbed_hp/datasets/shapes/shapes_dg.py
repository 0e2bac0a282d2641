"""ShapesDG: ten things in four styles, drawn from a seed, so that every command runs with nothing to download.

Four of the classes have names that the embedded CLIP has never read, as class names of real data sets are not always
the words of captions; poses are a little wider than what it has mostly seen. Both hold in every environment: that is
what adaptation has to learn.

In each environment a colour goes with the class and misleads elsewhere: with probability `CUE` its hue is number
(class + shift) of `HUES`, with a shift per environment; otherwise any hue. In the cartoons it is the colour of the
thing, elsewhere that of the ground.
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

THINGS = {  # class name -> what is drawn
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


def looks() -> dict[str, "Look"]:
    """The style of each environment."""
    from domainbed_hp.datasets.shapes.drawings import Look

    pose: dict[str, Any] = {"size": (0.4, 0.75), "angle": 25, "stretch": 0.2, "clutter": 4}
    return {
        "A": Look("painting", grain=(0, 0.03), **pose),
        "C": Look("cartoon", line=(1.0, 1.8), grain=(0, 0), **pose),
        "P": Look("photo", grain=(0.03, 0.08), **pose),
        "S": Look("sketch", line=(0.6, 1.2), wobble=0.7, dark_ground=0, grain=(0, 0.03), **pose),
    }


def draw_environment(env: str, per_class: int = PER_CLASS) -> np.ndarray:
    """(classes * per_class, 64, 64, 3) uint8, class by class; an image depends on (env, class, number) alone."""
    from domainbed_hp.datasets.shapes.drawings import HUES, draw

    hues, look = list(HUES.values()), looks()[env]
    images = []
    for class_i, (name, thing) in enumerate(THINGS.items()):
        for i in range(per_class):
            random = rng("ShapesDG", env, name, i)
            cue_i = class_i + SHIFTS[env] if random.random() < CUE else random.integers(len(hues))
            cue, other = hues[int(cue_i) % len(hues)], random.random()
            images.append(draw(random, thing, look, *((cue, other) if env == "C" else (other, cue))))
    return np.stack(images)


def cache_path() -> Path:
    """In the cache folder; the name carries a digest of the code that draws."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("polygons.py", "drawings.py", "shapes_dg.py"))
    return cache_dir() / f"shapes_dg-{hashlib.sha256(code).hexdigest()[:12]}.npz"


def cached(path: Path) -> dict[str, np.ndarray] | None:
    """The drawings in the file; None where it is missing or damaged (a .npz carries checksums)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {env: stored[env] for env in ENVIRONMENTS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def build() -> list[Images]:
    """All environments; drawn once (seconds) however many jobs ask at the same time, then read from the cache."""
    import filelock

    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        arrays = cached(path)
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
    folder="",
    domain_folders=("art_painting", "cartoon", "photo", "sketch"),
    image_counts=(len(CLASS_NAMES) * PER_CLASS,) * len(ENVIRONMENTS),
    image_size=64,
    steps=301,
    checkpoint_freq=50,
    licence="drawn by this package, under its licence",
    citation="",
    homepage="",
    build=build,
)
