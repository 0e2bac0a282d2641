"""Random images that need no disk: DomainBed's Debug28 and Debug224 (datasets.py), for tests and dry runs."""

from functools import partial

import numpy as np

from domainbed_hp.datasets.spec import ArrayImages, DatasetSpec, Images
from domainbed_hp.seeds import rng


def build(size: int) -> list[Images]:
    """Make three environments of 16 noise images (size, size, 3) in two classes."""
    # DEVIATION: DomainBed draws them from the global generator; here every run sees the same ones.
    generators = [rng("debug", size, env) for env in range(3)]
    return [ArrayImages(r.integers(0, 256, (16, size, size, 3), np.uint8), r.integers(0, 2, 16)) for r in generators]


DEBUG28 = DatasetSpec(
    "Debug28", ("0", "1", "2"), 2, image_counts=(16,) * 3, image_size=28, checkpoint_freq=100, build=partial(build, 28)
)
DEBUG224 = DatasetSpec(
    "Debug224", ("0", "1", "2"), 2, image_counts=(16,) * 3, checkpoint_freq=100, build=partial(build, 224)
)
