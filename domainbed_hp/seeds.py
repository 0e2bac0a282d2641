"""Every random number is a function of what it is for."""

import hashlib

import numpy as np


def seed_hash(*args: object) -> int:
    """A 31-bit seed from any arguments, as DomainBed's lib/misc.py: md5 of the printed tuple."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % (2**31)


def rng(*key: object) -> np.random.Generator:
    """A generator of its own for one purpose, e.g. `rng(seed, "batch", env, step)`."""
    return np.random.default_rng(seed_hash(*key))
