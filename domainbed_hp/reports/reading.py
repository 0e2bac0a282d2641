"""Folders of runs under a folder, and the numbers of many records as columns of 8 bytes each."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_hp.registry import UsageError


def walk(input_dir: Path) -> Iterator[tuple[str, set[str]]]:
    """(folder, its file names), sorted; also through links, each real folder once."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}; expected a folder of runs") from error

    seen: set[tuple[int, int]] = set()
    # DEVIATION: DomainBed looks one level deep and finds nothing in nested sweeps.
    for folder, subfolders, files in os.walk(input_dir, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (real := (status.st_dev, status.st_ino)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield folder, set(files)


class Layout:
    """The numbers of records that have the same keys."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.names = [name for name, value in record.items() if value is None or type(value) in (float, int)]
        self.take = itemgetter(*self.names)
        self.num_envs = next(i for i in count() if f"env{i}_out_acc" not in record)
        self.numbers, self.places = array("d"), array("q")

    def add(self, record: dict[str, Any], place: int) -> None:
        values = list(self.take(record))
        try:
            self.numbers.fromlist(values)  # all or none
        except TypeError:
            self.numbers.fromlist([value if type(value) in (float, int) else math.nan for value in values])
        self.places.append(place)


def columns(length: int, layouts: Iterable[Layout]) -> dict[str, np.ndarray]:
    """`num_envs`, `step`, and every other number; NaN where a record has none."""
    found = {"num_envs": np.zeros(length, dtype=int), "step": np.zeros(length, dtype=int)}
    for layout in layouts:
        places = np.array(layout.places)
        found["num_envs"][places] = layout.num_envs
        values = np.array(layout.numbers).reshape(len(places), -1)
        for name, column in zip(layout.names, values.T, strict=True):
            found.setdefault(name, np.full(length, math.nan))[places] = column
    return found
