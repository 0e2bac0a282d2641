"""A small folder data set with images of all kinds, in two environments."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from domainbed_hp.datasets.spec import DatasetSpec

SPEC = DatasetSpec(
    name="Pets",
    environments=("A", "B"),
    num_classes=2,
    class_names=("cat", "dog"),
    folder="pets",
    domain_folders=("art", "my book"),
    image_counts=(9, 4),
)
FILES = {
    "art/cat/2.png": ("RGB", (40, 30)),
    "art/cat/10, or so.PNG": ("L", (30, 44)),
    "art/cat/in/1.jpg": ("RGB", (90, 21)),
    "art/cat/in-2/1.png": ("RGBA", (24, 24)),
    "art/cat/in/deep/1.png": ("P", (17, 80)),
    "art/dog/a.png": ("1", (25, 25)),
    "art/dog/b.webp": ("RGB", (33, 29)),
    'art/dog/c "quoted".jpg': ("CMYK", (50, 40)),
    "art/dog/tiny.bmp": ("RGB", (5, 3)),
    "my book/cat/a.png": ("RGB", (31, 27)),
    "my book/cat/b.jpeg": ("L", (64, 64)),
    "my book/dog/é.png": ("RGB", (20, 20)),
    "my book/dog/b.tiff": ("RGB", (26, 39)),
}


def preprocess(size: int = 20, resize: str = "crop", interpolation: str = "bicubic") -> SimpleNamespace:
    return SimpleNamespace(size=size, resize=resize, interpolation=interpolation, augmentation="none")


def make_pets(data_dir: Path) -> Path:
    for i, (name, (mode, size)) in enumerate(FILES.items()):
        path = data_dir / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i, size).convert(mode).save(path)
    return data_dir


def draw(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
