"""Load ahead in background threads, in order.

Threads, not processes: decoding, resizing and reading release Python's lock, nothing is copied, and an error arrives as
it was raised. The functions that run in them use NumPy and Pillow, never torch's own threads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Number of items, beyond one for each thread, that are computed ahead of the caller; it bounds the memory."""


class ThreadPool:
    """`num_workers` threads that all loaders of a run share; with 0 the caller does the work."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.executor = ThreadPoolExecutor(num_workers, "prefetch") if num_workers else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield function(item) for every item in order, computed at most `num_workers` + `AHEAD` items ahead."""
        if self.executor is None:
            yield from map(function, items)
            return
        futures: deque[Future[Result]] = deque()
        try:
            for item in items:
                futures.append(self.executor.submit(function, item))
                if len(futures) > self.num_workers + AHEAD:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:  # also where the caller stops early
            for future in futures:
                future.cancel()

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
