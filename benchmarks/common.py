"""Helpers that several benchmarks share: a data set of links, a quiet machine, interleaved rounds and their ratios."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from numpy.typing import ArrayLike

T = TypeVar("T")


def link_images(data_dir: Path, folder: Path, images: int) -> None:
    """Link the first `images` of each environment of PACS into `folder`, classes in turn; 0 links all of them."""
    if not images:
        (folder / "PACS").symlink_to((data_dir / "PACS").resolve())
        return
    for env in sorted((data_dir / "PACS").iterdir()):
        classes = [sorted(path.iterdir()) for path in sorted(env.iterdir())]
        for i in range(images):
            source = classes[i % len(classes)][i // len(classes)]
            target = folder / "PACS" / source.relative_to(data_dir / "PACS")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop what is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def use_one_thread(device: torch.device) -> str:
    """Put torch on one thread, pinned to a core where the device is the CPU; return the device in words."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)  # the loader's threads have all cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return "one core"


def interleave(variants: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Return the results of each variant, called once a round with the round's number; the order alternates."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    for round_i in range(rounds):
        for name, variant in list(variants.items())[:: -1 if round_i % 2 else 1]:
            results[name].append(variant(round_i))
    return results


def format_spread(ratios: ArrayLike) -> str:
    """Return the median of the rounds, and their 5 to 95 %, as text."""
    low, median, high = np.quantile(ratios, (0.05, 0.5, 0.95))
    return f"{format_number(median)} ({format_number(low)} to {format_number(high)})"


def format_number(x: float) -> str:
    """Return three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"
