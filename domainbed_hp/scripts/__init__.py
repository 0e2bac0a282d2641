"""Command lines: a module for each command, with `main(argv) -> exit code`."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence

from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, RunTaken


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Return the exit code of `main`; a `UsageError` becomes one line on stderr and 2, a `RunTaken` `EXIT_TAKEN`."""
    try:
        return main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_TAKEN if isinstance(error, RunTaken) else 2


@contextlib.contextmanager
def pause_gc() -> Iterator[None]:
    """Import torch without garbage collection, and leave the new objects out of all later collections.

    Imports make little garbage. The search for it, then and at exit, took 1.4 of the 4 s CPU of a run of one step.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
