"""Records of a run: one JSON object per line of `results.jsonl`, the only link between training and reporting.

The format is DomainBed's: either package reads the other's files.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import orjson

from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import RESULTS

TAIL_BYTES = 2**16
"""Length of the end of `results.jsonl` in which `last_record` looks for a record."""


class Record(TypedDict, total=False):
    """The keys of a record. Records of DomainBed have the keys up to `hparams`. Numbers with other keys are

    - `env{i}_in_acc`, `env{i}_out_acc`, `env{i}_uda_acc`: the accuracy in [0, 1] on a split of environment i;
    - the metrics of the algorithm's steps, such as `loss`, `ce` or `mmd`: means over the steps since the last record;
    - the values of `Algorithm.diagnose`, such as `val_mmd`.
    """

    step: int  # index of the last update; the first one has index 0
    epoch: float  # number of passes through the smallest environment, test environments included
    step_time: float  # mean time of a step in seconds
    mem_gb: float  # peak of allocated GPU memory in GiB; 0 on the CPU
    args: dict[str, Any]  # flags of the run: the fields of RunArgs
    hparams: dict[str, Any]  # hyperparameters, after draws and overrides
    versions: dict[str, str]  # versions of the code and its libraries, and the hardware
    elapsed_s: float  # wall-clock time of the run in seconds, without the time in which it was stopped
    image_size: int  # side of the images in pixels
    trainable_params: int  # number of parameters that are trained
    protocol: dict[str, Any]  # what must agree where accuracies are compared: preprocessing, weights, text
    val_loss: float  # mean over the training environments of the cross-entropy on their `out` splits
    raw_val_loss: float  # the same for the weights that are trained, where an average of weights is scored
    gates: list[list[float]]  # gates of the attention heads: layers x heads


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add one whole line to a run's results.jsonl and sync it to disk. On an error nothing is added."""
    line = json.dumps(record, sort_keys=True, default=to_plain).encode() + b"\n"
    with open(folder / RESULTS, "ab+", buffering=0) as file:
        size = file.tell()
        if size:
            # A killed run may have left half a line: end it, or it would swallow this one.
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


def truncate_records(folder: Path, step: int) -> list[int]:
    """Remove the records of a run after `step`, and torn lines; return the steps of the records that are left."""
    if not (folder / RESULTS).exists():
        return []
    records = [record for record in read_records(folder) if record["step"] <= step]
    with replace_atomically(folder / RESULTS) as temporary:
        temporary.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
    return [record["step"] for record in records]


def read_records(folder: str | Path, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records in the folder of a run; none where it has no results.jsonl.

    Args:
        folder: the folder of a run.
        notes: gets a line for each torn line, for an empty file and for NaN. Without it, torn lines are warnings.

    Raises:
        UsageError: results.jsonl cannot be read.
    """
    path = os.path.join(folder, RESULTS)
    if not os.path.lexists(path):
        return
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if notes is not None and not any(map(bytes.strip, lines)):
        notes.append(f"{path} is empty")
    nan = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = None
        try:
            record = orjson.loads(line)
        except ValueError:  # a torn line, or one with NaN, which is no JSON but is written by DomainBed
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                nan += 1
        if isinstance(record, dict):
            yield record
            continue
        message = f"{path}: line {number} is not a whole record (cut off?) and is left out"
        if notes is None:
            warnings.warn(message, stacklevel=2)
        else:
            notes.append(message)
    if nan and notes is not None:
        notes.append(f"{path}: {nan} records hold NaN; a NaN validation accuracy ranks below every other")


def last_record(folder: Path) -> dict[str, Any] | None:
    """Return the last whole record of a run, read from the end of its results.jsonl; None if there is none."""
    try:
        with open(folder / RESULTS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                return record
    return None


def to_plain(value: Any) -> object:
    """Convert a NumPy scalar or array, or a path, to a value that JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a record cannot hold {value!r} of type {type(value).__name__}")
