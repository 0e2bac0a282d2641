"""Command line: argparse in, exit code out."""

import sys
from collections.abc import Callable, Sequence

from domainbed_hp.registry import UsageError


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main`; bad input becomes one message on stderr and exit code 2."""
    try:
        return main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
