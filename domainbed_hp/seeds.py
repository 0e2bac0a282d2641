"""Seeds: every random number is a function of its purpose."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def seed_hash(*args: object) -> int:
    """Return a 31-bit seed from any arguments, as DomainBed's lib/misc.py: md5 of the printed tuple."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % (2**31)


def rng(*key: object) -> np.random.Generator:
    """Return the generator for one purpose, for example `rng(seed, "batch", env, step)`."""
    import numpy as np  # `sweep status` needs no numpy

    return np.random.default_rng(seed_hash(*key))
