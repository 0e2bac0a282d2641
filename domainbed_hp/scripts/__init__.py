"""Command line: argparse in, exit code out."""

import sys
from collections.abc import Callable, Sequence

from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, Taken


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main`; bad input becomes one message on stderr and exit code 2, a run that is taken `EXIT_TAKEN`."""
    try:
        return main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_TAKEN if isinstance(error, Taken) else 2
