"""Records: one JSON object per checkpoint in `{run_dir}/results.jsonl`, the only link between training and reporting.

The format is DomainBed's (scripts/train.py writes it, lib/reporting.py reads it); either package reads the other's.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from domainbed_hp.disk import replaced
from domainbed_hp.registry import UsageError

Record = dict[str, Any]

FILE_NAME = "results.jsonl"
ENV_ACC = re.compile(r"env\d+_(in|out)_acc")
# What two runs must share, apart from their seeds and test environments, to be averaged into one cell of a table.
PROTOCOL = ("algorithm", "hparams", "steps", "holdout_fraction", "eval_images")


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
    with replaced(path) as temporary:
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


def load(input_dir: str | Path) -> list[Record]:
    """All records under a folder, runs in sorted order, each record with its folder as `run_dir`.

    Raises:
        UsageError: not a folder, or something in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}; expected a folder of runs") from error

    records = []
    seen: set[str] = set()
    # DEVIATION: DomainBed looks one level deep and finds nothing in nested sweeps.
    for folder, subfolders, files in os.walk(input_dir, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        if FILE_NAME in files:
            try:
                records += [{**record, "run_dir": folder} for record in load_run(folder)]
            except OSError as error:
                refuse(error)
    return records


def row_label(args: dict[str, Any]) -> str:
    """The row of a table that a run belongs to."""
    return str(args.get("label") or args["algorithm"])


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: row, algorithm, dataset, test_envs (tuple), both seeds, step, num_envs, env{i}_{in,out}_acc.

    `num_envs` counts `env{i}_out_acc` from 0 until one is missing, as DomainBed does.

    Raises:
        UsageError: a record lacks a key that model selection needs.
    """
    rows = []
    for record in records:
        try:
            args = record["args"]
            row = {
                "row": row_label(args),
                **{key: args[key] for key in ("algorithm", "dataset", "trial_seed", "hparams_seed")},
                "test_envs": tuple(args["test_envs"]),
                "step": record["step"],
                "num_envs": next(i for i in count() if f"env{i}_out_acc" not in record),
                **{key: value for key, value in record.items() if ENV_ACC.fullmatch(key)},
            }
            needed = [f"env{i}_{split}_acc" for i in row["test_envs"] for split in ("in", "out")]
            missing = [key for key in needed if key not in record]
        except KeyError as error:
            missing = [str(error.args[0])]
        if missing:
            raise UsageError(
                f"a record of {_where(record)} has no {', '.join(missing)}; it needs args.algorithm, args.dataset, "
                "args.test_envs, args.trial_seed, args.hparams_seed, step, "
                "env{i}_out_acc of every environment i and env{t}_in_acc of every test environment t"
            )
        rows.append(row)
    return pd.DataFrame(rows)


def check_protocol(records: Iterable[Record]) -> None:
    """Refuse to average runs that differ in more than seeds and test environments.

    Only keys that both runs wrote are compared.

    Raises:
        UsageError: naming the difference and both run folders.
    """
    # DEVIATION: DomainBed merges whatever shares (dataset, algorithm, test_envs, seeds), without a word.
    first: dict[tuple[str, str], Record] = {}
    for record in records:
        args = record["args"]
        row = row_label(args), args["dataset"]
        other = first.setdefault(row, record)
        for key in PROTOCOL:
            if key not in args or key not in other["args"] or args[key] == other["args"][key]:
                continue
            a, b = other["args"][key], args[key]
            if key == "hparams" and _overrides(a) == _overrides(b):
                continue
            raise UsageError(
                f"runs of row {row[0]!r} on {row[1]} differ in {key}: "
                f"{a!r} in {_where(other)}, {b!r} in {_where(record)}. One row is one protocol: "
                "collect them from separate folders, or give one of them a --label"
            )


def _overrides(hparams: str | None) -> object:
    """`--hparams` as what it means, not how it was typed."""
    try:
        return json.loads(hparams or "{}")
    except (TypeError, ValueError):
        return hparams


def _where(record: Record) -> str:
    return str(record.get("run_dir") or record.get("args", {}).get("output_dir") or "an unnamed run")
