"""Load a folder of runs: one table of all numbers, and the arguments, hparams and versions of every run.

Only the numbers of records stay in memory: a sweep of a million records fits on a laptop.
"""

import gc
import math
import os
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from domainbed_hp.records import read_records
from domainbed_hp.registry import UsageError
from domainbed_hp.reports.rows import PlannedJob, Run, assign_rows
from domainbed_hp.run_args import find_differences
from domainbed_hp.run_dir import DONE, RESULTS
from domainbed_hp.sweep.jobs import SWEEP_FILE, load_sweep

REQUIRED_ARGS = ("algorithm", "dataset", "trial_seed", "hparams_seed", "test_envs")
"""Arguments of every record, which give a run its place in the tables."""


@dataclass
class CollectedRuns:
    """All runs and sweeps under a folder.

    `frame` has one line per record, with the columns run (index into `runs`), row, algorithm, dataset, test_envs
    (tuple), trial_seed, hparams_seed, step, num_envs, and every number of the records (NaN where a record lacks it).
    `num_envs` counts `env{i}_out_acc` from i = 0 up to the first that is missing, as DomainBed does.
    """

    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    runs: list[Run] = field(default_factory=list)
    planned: list[PlannedJob] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    """The content of every sweep.json without its jobs."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the user: records that are left out, repeated runs, protocols that differ."""

    @property
    def planned_labels(self) -> list[str]:
        """Labels of rows in the order in which the sweeps list them."""
        return list(dict.fromkeys(str(row["label"]) for sweep in self.sweeps for row in sweep["rows"]))

    def count_planned_trials(self, label: str) -> int | None:
        """Return the number of trials that the sweeps plan for this row alone; None for the usual number."""
        numbers = [row.get("n_trials") for sweep in self.sweeps for row in sweep["rows"] if row["label"] == label]
        return max(numbers) if numbers and all(numbers) else None


def load_runs(input_dir: str | Path) -> CollectedRuns:
    """Load all runs under a folder, in the order of their sorted paths.

    Raises:
        UsageError: `input_dir` is not a folder, a file cannot be read, or a record lacks a key of model selection.
    """
    collected = CollectedRuns()
    gc_was_enabled = gc.isenabled()
    gc.disable()  # records hold no reference cycles: loading takes a tenth less time
    try:
        return collect_records(read_folders(Path(input_dir), collected), collected)
    finally:
        if gc_was_enabled:
            gc.enable()


def read_folders(input_dir: Path, collected: CollectedRuns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (folder, record) for every record under a folder; add its sweeps, planned jobs and notes to `collected`."""
    for folder, files in walk_folders(input_dir):
        if SWEEP_FILE in files:
            sweep, jobs = load_sweep(Path(folder))
            for job in jobs:
                check_args(job.args, f"a job of {os.path.join(folder, SWEEP_FILE)}")
            collected.sweeps.append(sweep)
            collected.planned.extend(PlannedJob(job, (job.folder / DONE).exists()) for job in jobs)
        if RESULTS in files:
            for record in read_records(folder, collected.notes):
                yield folder, record


def walk_folders(input_dir: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield (folder, names of its files) in sorted order, symbolic links followed, every real folder once."""

    def raise_usage_error(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}; expected a folder of runs") from error

    seen: set[tuple[int, int]] = set()
    # DEVIATION: DomainBed looks one level deep and finds nothing in nested sweeps.
    for folder, subfolders, files in os.walk(input_dir, onerror=raise_usage_error, followlinks=True):
        status = os.stat(folder)
        if (inode := (status.st_dev, status.st_ino)) in seen:
            subfolders.clear()
            continue
        seen.add(inode)
        subfolders.sort()
        yield folder, set(files)


def collect_records(
    records: Iterable[tuple[str, dict[str, Any]]], collected: CollectedRuns | None = None
) -> CollectedRuns:
    """Add the table and runs of (folder, record) pairs to `collected`, which has their sweeps and notes.

    Consecutive records of one folder are one run, unless their arguments are those of different runs.
    """
    collected = collected or CollectedRuns()
    runs = collected.runs
    run_of_record = array("q")
    stores: dict[tuple[str, ...], NumberStore] = {}
    args: dict[str, Any] = {}
    last_folder: str | None = None
    store: NumberStore | None = None
    for folder, record in records:
        new_run = folder != last_folder
        if new_run or record.get("args") != args:
            last_args, args, last_folder = args, record.get("args") or {}, folder
            # A resumed run may have another data_dir or device, or arguments that an earlier version wrote.
            new_run = new_run or bool(find_differences(last_args, args))
        if new_run:
            check_args(args, f"a record of {folder}")
            hparams, protocol = record.get("hparams", {}), record.get("protocol", {})
            runs.append(Run(folder, args, hparams, [], record.get("image_size"), protocol))
        if "versions" in record and record["versions"] not in runs[-1].versions[-1:]:
            runs[-1].versions.append(record["versions"])
        last_store, keys = store, tuple(record)
        store = stores.get(keys)
        if new_run or store is not last_store or store is None:
            accs = [f"env{i}_{split}_acc" for i in runs[-1].args["test_envs"] for split in ("in", "out")]
            require_keys(record, ["step", *accs], f"a record of {folder}")
        if store is None:
            store = stores[keys] = NumberStore(record)
        store.add(record, len(run_of_record))
        run_of_record.append(len(runs) - 1)
    columns = make_columns(len(run_of_record), stores.values())
    collected.frame = pd.DataFrame({"run": np.array(run_of_record, dtype=int), **columns})
    for name in REQUIRED_ARGS:
        values = [tuple(run.args[name]) if name == "test_envs" else run.args[name] for run in runs]
        column = spread_over_records(values, collected.frame["run"])
        collected.frame[name] = column.astype(int) if name.endswith("_seed") else column
    collected.notes += assign_rows(collected.runs, collected.planned)
    collected.frame["row"] = spread_over_records([run.row for run in runs], collected.frame["run"])
    collected.notes += describe_repeated_runs(collected)
    return collected


def spread_over_records(values: list[Any], run_of_record: pd.Series) -> pd.Series:
    """Return a column that holds, for every record, the value of its run."""
    by_run = np.empty(len(values), dtype=object)
    by_run[:] = values
    return pd.Series(by_run[run_of_record], dtype=object)  # objects are faster to iterate than pandas' strings


def check_args(args: Collection[str], source: str) -> None:
    """Raise `UsageError` if arguments lack one of `REQUIRED_ARGS`; `source` names their place."""
    require_keys([f"args.{name}" for name in args], [f"args.{name}" for name in REQUIRED_ARGS], source)


def require_keys(keys: Collection[str], required: Iterable[str], source: str) -> None:
    """Raise `UsageError` if one of the required keys is absent; `source` names the place of the keys."""
    if missing := [key for key in required if key not in keys]:
        raise UsageError(
            f"{source} has no {', '.join(missing)}; a record needs args.algorithm, args.dataset, args.test_envs, "
            "args.trial_seed, args.hparams_seed, step, env{i}_out_acc of every environment i and env{t}_in_acc of "
            "every test environment t"
        )


def describe_repeated_runs(collected: CollectedRuns) -> list[str]:
    """Return a note for every run whose records count more than once."""
    ids: dict[tuple[Any, ...], int] = {}
    id_of_run = []
    for run in collected.runs:
        seeds, envs = (run.args["trial_seed"], run.args["hparams_seed"]), tuple(sorted(run.args["test_envs"]))
        id_of_run.append(ids.setdefault((run.row, run.args["dataset"], seeds, envs), len(ids)))
    id_of_record = np.array(id_of_run, dtype=int)[collected.frame["run"]]
    places = pd.DataFrame({"id": id_of_record, "step": collected.frame["step"]})
    notes = []
    for repeated in sorted(places["id"][places.duplicated()].unique()):
        folders = dict.fromkeys(run.folder for run, i in zip(collected.runs, id_of_run, strict=True) if i == repeated)
        copies = " and ".join(folders)
        notes.append(f"records of one run exist more than once, and all of them count: {copies}; remove the copies")
    return notes


class NumberStore:
    """The numbers of all records that have the same keys, 8 bytes each."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.names = [name for name, value in record.items() if value is None or type(value) in (float, int)]
        self.get_values = itemgetter(*self.names)
        self.num_envs = next(i for i in count() if f"env{i}_out_acc" not in record)
        self.numbers, self.positions = array("d"), array("q")

    def add(self, record: dict[str, Any], position: int) -> None:
        """Store the numbers of a record; `position` is its line of the table."""
        values = list(self.get_values(record))
        try:
            self.numbers.fromlist(values)  # all or none
        except TypeError:
            self.numbers.fromlist([value if type(value) in (float, int) else math.nan for value in values])
        self.positions.append(position)


def make_columns(length: int, stores: Iterable[NumberStore]) -> dict[str, np.ndarray]:
    """Return `num_envs`, `step` and every other number as columns of `length`; NaN where a record lacks it."""
    columns = {"num_envs": np.zeros(length, dtype=int), "step": np.zeros(length, dtype=int)}
    for store in stores:
        positions = np.array(store.positions)
        columns["num_envs"][positions] = store.num_envs
        values = np.array(store.numbers).reshape(len(positions), -1)
        for name, column in zip(store.names, values.T, strict=True):
            columns.setdefault(name, np.full(length, math.nan))[positions] = column
    return columns
