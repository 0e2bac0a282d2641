"""What a process that runs several jobs keeps between them: loaded CLIPs, text features, opened data sets."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LIMIT = 4
"""Results of one function that are kept; the one that was not asked for the longest goes first."""
keeping = False


def start() -> None:
    """From now on keep."""
    global keeping
    keeping = True


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, asked once for the same arguments where a process keeps; nobody may change what it returns."""
    remembered = functools.lru_cache(maxsize=LIMIT)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return remembered(*args, **kwargs) if keeping else function(*args, **kwargs)  # type: ignore[arg-type]

    return call
