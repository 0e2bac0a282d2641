"""Work ahead in background threads, in order.

Threads, not processes: decoding, resizing and reading release Python's lock, nothing is copied between processes, and
an error arrives as it was raised. What runs in them uses numpy and Pillow, never torch's own threads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Results that wait, beside those that the threads are at; bounds the memory."""


class Workers:
    """`num_workers` threads that all loaders of a run share; 0: the caller does the work itself."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.pool = ThreadPoolExecutor(num_workers, "prefetch") if num_workers else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) for each item in order, at most `num_workers` + `AHEAD` of them ahead of the caller."""
        if self.pool is None:
            yield from map(function, items)
            return
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(self.pool.submit(function, item))
                if len(ahead) > self.num_workers + AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where the caller stops early
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
