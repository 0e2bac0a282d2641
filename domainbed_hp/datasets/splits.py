"""Split environments: `in` to train on, `out` held out, `uda` the unlabeled images of a test environment."""

from collections.abc import Collection, Sequence

import numpy as np

from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import seed_hash


def split_dataset(n: int, size: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the first `size` items and the rest of a permutation of range(n), as DomainBed's lib/misc.py."""
    keys = list(range(n))
    np.random.RandomState(seed).shuffle(keys)
    return keys[:size], keys[size:]


def split_environments(
    lengths: Sequence[int],
    test_envs: Collection[int],
    trial_seed: int,
    holdout_fraction: float = 0.2,
    uda_holdout_fraction: float = 0.0,
) -> list[dict[str, list[int]]]:
    """Return {"in": indices, "out": ..., "uda": ...} of every environment, drawn by the trial seed alone.

    `lengths` are the numbers of images. Test environments give `uda_holdout_fraction` of their `in` to `uda`, which is
    left out if it is empty. Source: DomainBed's scripts/train.py.
    """
    # DEVIATION: DomainBed names uda splits by their position among uda splits; here they belong to their environment.
    for name, fraction in (("holdout_fraction", holdout_fraction), ("uda_holdout_fraction", uda_holdout_fraction)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{name}: got {fraction}, expected a number from 0 to below 1")
    if wrong := sorted(set(test_envs) - set(range(len(lengths)))):
        raise UsageError(f"test_envs: got {wrong}, known: 0 to {len(lengths) - 1}")
    result = []
    for env_i, n in enumerate(lengths):
        seed = seed_hash(trial_seed, env_i)
        held_out, train = split_dataset(n, int(n * holdout_fraction), seed)
        split = {"in": train, "out": held_out}
        if env_i in test_envs:
            first, rest = split_dataset(len(train), int(len(train) * uda_holdout_fraction), seed)
            if first:
                split = {"in": [train[i] for i in rest], "out": held_out, "uda": [train[i] for i in first]}
        result.append(split)
    return result
