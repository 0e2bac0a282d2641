"""What a run prints: to the terminal, and to `out.txt` in its folder."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import domainbed_hp


def versions() -> dict[str, str]:
    """What a number depends on besides the arguments."""
    return {
        "domainbed_hp": domainbed_hp.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def print_header(args: dict[str, Any], hparams: dict[str, Any]) -> None:
    """What is run with what."""
    for title, table in (("Environment", versions()), ("Args", args), ("HParams", hparams)):
        print(f"{title}:")
        for name, value in sorted(table.items()):
            print(f"\t{name}: {value}")


def print_row(record: dict[str, Any], columns: list[str]) -> list[str]:
    """One row of numbers, under a header where the columns are new; returns the columns."""
    if sorted(record) != columns:
        columns = sorted(record)
        print("  ".join(name.ljust(12) for name in columns))
    cells = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in (record[name] for name in columns)]
    print("  ".join(cell.ljust(max(12, len(name))) for cell, name in zip(cells, columns, strict=True)), flush=True)
    return columns


@contextlib.contextmanager
def log_to(output_dir: Path) -> Iterator[None]:
    """Copy what is printed to `out.txt`."""
    with open(output_dir / "out.txt", "a") as out, contextlib.redirect_stdout(Tee(out)):
        yield


class Tee:
    """Standard output and a file."""

    def __init__(self, file: Any) -> None:
        self.targets = (sys.stdout, file)

    def write(self, text: str) -> int:
        for target in self.targets:
            target.write(text)
        return len(text)

    def flush(self) -> None:
        for target in self.targets:
            target.flush()
