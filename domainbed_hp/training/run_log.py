"""What a run prints: to the terminal, and to `out.txt` in its folder."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import domainbed_hp
from domainbed_hp import run_dir
from domainbed_hp.files import cpu_count


def versions(device: torch.device) -> dict[str, str]:
    """What a number depends on besides the arguments."""
    return {
        "commit": commit(),
        "hardware": hardware(device),
        "domainbed_hp": domainbed_hp.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


@cache
def commit() -> str:
    """The commit that this package's files are of, with a + where they differ from it; "none": not a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A checkout that the package is only installed in does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        asked = [*git, "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def hardware(device: torch.device) -> str:
    """The GPU by its name, or the CPU and how many of its cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        return f"{name}, {cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {cpu_count()} cores"


def print_header(args: dict[str, Any], hparams: dict[str, Any], made_by: dict[str, str]) -> None:
    """What is run with what."""
    for title, table in (("Environment", made_by), ("Args", args), ("HParams", hparams)):
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
    with open(output_dir / run_dir.OUT, "a") as out, contextlib.redirect_stdout(Tee(out)):
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
