"""What several benchmarks share: images to measure on, a machine that is quiet, turns and their ratios."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from domainbed_hp.run_args import RunArgs
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.training.setup import plan

T = TypeVar("T")


def subset(data_dir: Path, folder: Path, images: int) -> None:
    """Links to the first `images` of each environment of PACS, classes in turn; 0: to all of them."""
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


def prepare_for(args: RunArgs) -> None:
    """Prepare what a run reads, as its tower wants it."""
    with quiet():
        size, resize, interpolation, _ = plan(args).preprocess
        shape = ["--image_size", str(size), "--resize", resize, "--interpolation", interpolation, "--encoding", "raw"]
        prepare(["--data_dir", str(args.data_dir), "--dataset", args.dataset, *shape])
        assert plan(args).dataset.source == "prepared, raw"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def one_thread(device: torch.device) -> str:
    """Torch on one thread, on the CPU pinned to a core; returns what it runs on."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)  # the loader's threads have all cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return "one core"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(variants: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """What each variant returns, called with the number of each round; the order turns, too."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    for round_i in range(rounds):
        for name, variant in list(variants.items())[:: -1 if round_i % 2 else 1]:
            results[name].append(variant(round_i))
    return results


def spread(ratios: ArrayLike) -> str:
    """Median, and 5 to 95 % of the rounds."""
    low, median, high = np.quantile(ratios, (0.05, 0.5, 0.95))
    return f"{number(median)} ({number(low)} to {number(high)})"


def number(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"
