"""Command lines: a module for each command, with `main(argv) -> exit code`."""

import sys
from collections.abc import Callable, Sequence

from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, RunTaken


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Return the exit code of `main`; a `UsageError` becomes one line on stderr and 2, a `RunTaken` `EXIT_TAKEN`."""
    try:
        return main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_TAKEN if isinstance(error, RunTaken) else 2
