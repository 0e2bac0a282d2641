"""The text that a run prints, on the terminal and in `out.txt` in its folder."""

import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import domainbed_hp
from domainbed_hp.files import cpu_count


def find_versions(device: torch.device) -> dict[str, str]:
    """Return the software and hardware that a run's numbers depend on."""
    return {
        "commit": find_commit(),
        "hardware": describe_hardware(device),
        "domainbed_hp": domainbed_hp.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


@cache
def find_commit() -> str:
    """Return the commit of this package's checkout, with a + if files differ from it; "none" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Fails where the package is installed inside of another project's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def describe_hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        return f"{name}, {cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {cpu_count()} cores"


def print_header(args: dict[str, Any], hparams: dict[str, Any], versions: dict[str, str]) -> None:
    """Print the versions, the arguments and the hparams of a run."""
    for title, table in (("Environment", versions), ("Args", args), ("HParams", hparams)):
        print(f"{title}:")
        for name, value in sorted(table.items()):
            print(f"\t{name}: {value}")


def print_row(record: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Print the step and the floats of a record as a line of a table, and return the names of its columns.

    A header comes first if they differ from `columns`, those of the line before.
    """
    cells = {name: f"{value:.6g}" for name, value in sorted(record.items()) if isinstance(value, float)}
    cells = {"step": str(record["step"])} | cells
    if list(cells) != columns:
        print("  ".join(name.ljust(12) for name in cells))
    print("  ".join(cell.ljust(max(12, len(name))) for name, cell in cells.items()), flush=True)
    return list(cells)


@contextlib.contextmanager
def copy_stdout(path: Path) -> Iterator[None]:
    """Append everything that is printed to a file as well."""
    with open(path, "a") as file, contextlib.redirect_stdout(Tee(file)):
        yield


class Tee:
    """A stream that writes to standard output and to a file."""

    def __init__(self, file: Any) -> None:
        self.targets = (sys.stdout, file)

    def write(self, text: str) -> int:
        for target in self.targets:
            target.write(text)
        return len(text)

    def flush(self) -> None:
        for target in self.targets:
            target.flush()
