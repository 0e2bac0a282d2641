"""Records: one JSON object per checkpoint in `{run_dir}/results.jsonl`, the only link between training and reporting.

The format is DomainBed's (scripts/train.py writes it, lib/reporting.py reads it); either package reads the other's.
"""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_hp.files import replace_atomically

Record = dict[str, Any]

FILE_NAME = "results.jsonl"


def _plain(value: object) -> object:
    """What json cannot write itself: numpy scalars and arrays (a random draw may be an int64), and paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a record cannot hold {value!r} of type {type(value).__name__}")


def append(run_dir: str | Path, record: Record) -> None:
    """Add one whole line to the run's results.jsonl, on disk when this returns; on an error nothing is added."""
    line = json.dumps(record, sort_keys=True, default=_plain).encode() + b"\n"
    with open(Path(run_dir) / FILE_NAME, "ab+", buffering=0) as file:
        size = file.tell()
        if size:
            # A killed run may have left half a line: close it, or it would swallow this one.
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def truncate(run_dir: str | Path, step: int) -> list[int]:
    """Drop what a run wrote after `step`, and torn lines; returns the steps that stay."""
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        return []
    stay = [record for record in load_run(path) if record["step"] <= step]
    with replace_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in stay))
    return [record["step"] for record in stay]


def load_run(path: str | Path) -> list[Record]:
    """The records of a run folder or a results.jsonl, none if it is absent; a torn line is dropped with a warning."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            warnings.warn(f"{path}: line {number} is not a whole record (torn?) and is left out", stacklevel=2)
    return records
