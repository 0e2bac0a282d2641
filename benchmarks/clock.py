"""Where the time of a run goes: timers around the package's own functions, put there from outside."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from common import synchronise

from domainbed_hp import records
from domainbed_hp.algorithms import Algorithm
from domainbed_hp.datasets.loading.loader import Batch
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.training import loop

PARTS = ("load", "augment", "forward", "backward", "evaluate", "write", "start", "rest")
UNDIVIDED = ("start", "evaluate")
"""Parts that keep what else runs in them: loading what is scored, say."""


class Clock:
    """Seconds of each part of a run; the time of a part that runs inside another is its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.inside = device, defaultdict[str, float](float), ["rest"]
        self.last = time.perf_counter()

    def book(self) -> None:
        """Give the time since the last booking to the part that runs."""
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[self.inside[-1]] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.book()
        self.inside.append(self.inside[-1] if self.inside[-1] in UNDIVIDED else name)
        try:
            yield
        finally:
            self.book()
            self.inside.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def waiting(self, name: str, function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """Times how long each item of what `function` returns lets wait, whichever thread makes it."""

        def iterate(*args: Any) -> Iterator[Any]:
            items, end = iter(function(*args)), object()
            while True:
                with self.part(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        return iterate


@contextlib.contextmanager
def timers(clock: Clock, algorithm: type[Algorithm]) -> Iterator[None]:
    """Around all that makes up the parts of a run of `algorithm`."""
    run, optim = loop.TrainingLoop, torch.optim
    places: dict[str, list[tuple[Any, str]]] = {
        "start": [(loop, "set_up_run"), (run, "__init__")],
        "augment": [(Batch, "to")],
        "forward": [(algorithm, "update")],
        "backward": [
            (torch.autograd, "backward"),
            (torch.autograd, "grad"),
            (optim.AdamW, "step"),
            (optim.Adam, "step"),
            (optim.SGD, "step"),
        ],
        "evaluate": [(run, "score"), (algorithm, "diagnose")],
        "write": [(records, "append"), (run, "save_checkpoint"), (run, "save_model")],
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ThreadPool, "map", clock.waiting("load", ThreadPool.map)))
        for part, functions in places.items():
            for owner, name in functions:
                timed = clock.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
        yield
