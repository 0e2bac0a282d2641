"""A folder of runs as one table of numbers, and what is known of the runs; runs of two protocols never share a row.

Records are read one by one and only their numbers stay: a sweep of a million records fits on a laptop.
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from domainbed_hp.records import read_records
from domainbed_hp.registry import UsageError
from domainbed_hp.reports.reading import Layout, columns, walk
from domainbed_hp.run_dir import DONE, RESULTS
from domainbed_hp.sweep.jobs import SWEEP_FILE, Job, load_sweep

PROTOCOL = {
    "algorithm": None,
    "steps": None,
    "holdout_fraction": 0.2,
    "uda_holdout_fraction": 0.0,
    "eval_images": None,
    "task": "domain_generalization",
    "precision": "fp32",
    "loader": "batched",
}
"""Arguments that two runs must share, besides overrides of hparams, to be averaged into one cell of a table; and what
`train` takes for those that a sweep leaves out."""
IDENTIFYING = ("algorithm", "dataset", "trial_seed", "hparams_seed", "test_envs")
"""Arguments that say where in a table the records of a run belong."""
WEIGHTS = ("clip_model", "clip_pretrained", "backbone")
"""Hparams that say which pretrained weights a run started from."""


@dataclass
class Run:
    """What the records of one run share."""

    folder: str
    args: dict[str, Any]
    hparams: dict[str, Any] = field(default_factory=dict)
    versions: list[dict[str, Any]] = field(default_factory=list)
    """One after the other, where it was resumed under others."""
    image_size: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    """Under what terms its numbers stand, as far as its method says."""
    row: str = ""
    """The row of the tables that it belongs to."""

    @property
    def label(self) -> str:
        return str(self.args.get("label") or self.args["algorithm"])


@dataclass
class Planned:
    """A job that a sweep lists, and the row that it belongs to."""

    job: Job
    done: bool
    row: str = ""


@dataclass
class Collected:
    """Everything under a folder.

    `frame` has one line per record: run (index into `runs`), row, algorithm, dataset, test_envs (tuple), both seeds,
    step, num_envs, and every number that the record has, NaN where it has none. `num_envs` counts `env{i}_out_acc`
    from 0 until one is missing, as DomainBed does.
    """

    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    runs: list[Run] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    """What each sweep.json says besides its jobs."""
    notes: list[str] = field(default_factory=list)
    """What was left out, or needs an eye."""

    @property
    def row_plan(self) -> list[str]:
        """Labels of rows in the order of the sweeps that planned them."""
        return list(dict.fromkeys(str(row["label"]) for sweep in self.sweeps for row in sweep["rows"]))

    def trials_of(self, label: str) -> int | None:
        """How many trials the sweeps plan for a row by itself; None where it has as many as all others."""
        planned = [each.get("n_trials") for sweep in self.sweeps for each in sweep["rows"] if each["label"] == label]
        return max(planned) if planned and all(planned) else None


def load(input_dir: str | Path) -> Collected:
    """All runs under a folder, in sorted order.

    Raises:
        UsageError: not a folder, something in it cannot be read, or a record lacks what model selection needs.
    """
    collected = Collected()

    def found() -> Iterator[tuple[str, dict[str, Any]]]:
        for folder, files in walk(Path(input_dir)):
            if SWEEP_FILE in files:
                sweep, jobs = load_sweep(Path(folder))
                for job in jobs:
                    check_args(job.args, f"a job of {os.path.join(folder, SWEEP_FILE)}")
                collected.sweeps.append(sweep)
                collected.planned.extend(Planned(job, (job.folder / DONE).exists()) for job in jobs)
            if RESULTS in files:
                for record in read_records(folder, collected.notes):
                    yield folder, record

    collecting = gc.isenabled()
    gc.disable()  # records are many and hold no cycles: a tenth faster
    try:
        return collect(found(), collected)
    finally:
        if collecting:
            gc.enable()


def collect(found: Iterable[tuple[str, dict[str, Any]]], collected: Collected | None = None) -> Collected:
    """(folder, record) pairs as one table; consecutive records of one folder and the same arguments are a run.

    What is `collected` already, also while `found` is read, tells rows apart with them.
    """
    collected = collected or Collected()
    runs = collected.runs
    run_of = array("q")
    layouts: dict[tuple[str, ...], Layout] = {}
    args: dict[str, Any] | None = None
    folder_of: str | None = None
    layout: Layout | None = None
    for folder, record in found:
        new_run = args is None or folder != folder_of or record.get("args") != args
        if new_run:
            args, folder_of = record.get("args") or {}, folder
            check_args(args, f"a record of {folder}")
            hparams, protocol = record.get("hparams", {}), record.get("protocol", {})
            runs.append(Run(folder, args, hparams, [], record.get("image_size"), protocol))
        if "versions" in record and record["versions"] not in runs[-1].versions[-1:]:
            runs[-1].versions.append(record["versions"])
        before, keys = layout, tuple(record)
        layout = layouts.get(keys)
        if new_run or layout is not before or layout is None:
            needed = ["step", *(f"env{i}_{split}_acc" for i in runs[-1].args["test_envs"] for split in ("in", "out"))]
            if missing := [key for key in needed if key not in record]:
                raise lacking(f"a record of {folder}", missing)
        if layout is None:
            layout = layouts[keys] = Layout(record)
        layout.add(record, len(run_of))
        run_of.append(len(runs) - 1)
    frame = pd.DataFrame({"run": np.array(run_of, dtype=int), **columns(len(run_of), layouts.values())})
    for name in IDENTIFYING:
        values = np.empty(len(runs), dtype=object)
        values[:] = [tuple(run.args[name]) if name == "test_envs" else run.args[name] for run in runs]
        each = pd.Series(values[frame["run"]], dtype=object)  # object: quicker to iterate than pandas' strings
        frame[name] = each.astype(int) if name.endswith("_seed") else each
    collected.frame = frame
    return tell_apart(collected)


def check_args(args: Mapping[str, Any], whose: str) -> None:
    if missing := [key for key in IDENTIFYING if key not in args]:
        raise lacking(whose, [f"args.{key}" for key in missing])


def lacking(whose: str, missing: Sequence[str]) -> UsageError:
    return UsageError(
        f"{whose} has no {', '.join(missing)}; a record needs args.algorithm, args.dataset, args.test_envs, "
        "args.trial_seed, args.hparams_seed, step, env{i}_out_acc of every environment i and env{t}_in_acc of every "
        "test environment t"
    )


def tell_apart(collected: Collected) -> Collected:
    """Give runs and planned jobs their rows: their label, and behind it in what their protocol differs from others'."""
    # DEVIATION: DomainBed merges whatever shares (dataset, algorithm, test_envs, seeds), without a word.
    groups: dict[tuple[str, str], list[Run | Planned]] = defaultdict(list)
    for run in collected.runs:
        groups[run.label, run.args["dataset"]].append(run)
    for plan in collected.planned:
        groups[plan.job.row, plan.job.args["dataset"]].append(plan)
    for (label, dataset), members in groups.items():
        protocols = compared(members)
        wrote: dict[str, set[str]] = defaultdict(set)
        for values in protocols:
            for name, value in values.items():
                wrote[name].add(value)
        differing = [name for name, values in wrote.items() if len(values) > 1]
        for member, values in zip(members, protocols, strict=True):
            told = ", ".join(f"{name}={values.get(name, 'unknown')}" for name in differing)
            member.row = f"{label} ({told})" if told else label
        match_plans(members, protocols)
        if differing:
            runs = Counter(member.row for member in members if isinstance(member, Run))
            told = ", ".join(f"{row!r} ({number} runs)" for row, number in runs.items())
            what = ", ".join(differing)
            collected.notes.append(f"runs of {label!r} on {dataset} differ in {what} and are rows of their own: {told}")
    collected.notes += twice(collected)
    rows = np.array([run.row for run in collected.runs], dtype=object)
    collected.frame["row"] = pd.Series(rows[collected.frame["run"]], dtype=object)
    return collected


def twice(collected: Collected) -> list[str]:
    """Records that would count twice, a line for each pair of folders; leave-one-out leaves such steps out."""
    runs_of: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(collected.runs):
        seeds = run.args["trial_seed"], run.args["hparams_seed"]
        runs_of[run.row, run.args["dataset"], *seeds, tuple(sorted(run.args["test_envs"]))].append(i)
    repeats = collected.frame.duplicated(["run", "step"]) if collected.runs else pd.Series(dtype=bool)
    torn = set(collected.frame.loc[repeats, "run"]) if repeats.any() else set()
    lines = []
    for same in runs_of.values():
        if len(same) > 1 or same[0] in torn:
            here = collected.frame[collected.frame["run"].isin(same)]
            folders = dict.fromkeys(collected.runs[i].folder for i in same)
            if here.duplicated("step").any():
                lines.append(f"the same run twice, and counted twice: {' and '.join(folders)}")
    return lines


def match_plans(members: Sequence[Run | Planned], protocols: Sequence[Mapping[str, str]]) -> None:
    """Give a planned job the row of its own run, or else of the only runs that it does not contradict."""
    runs = [(m, values) for m, values in zip(members, protocols, strict=True) if isinstance(m, Run)]
    by_folder = {run.folder: run.row for run, _ in runs}
    kinds = {run.row: values for run, values in runs}
    for plan, values in zip(members, protocols, strict=True):
        if isinstance(plan, Planned):
            fits = [
                row for row, of in kinds.items() if all(of.get(name, value) == value for name, value in values.items())
            ]
            plan.row = by_folder.get(str(plan.job.folder), fits[0] if len(fits) == 1 else plan.row)


def compared(members: Sequence[Run | Planned]) -> list[dict[str, str]]:
    """The protocol of each: what must be equal in one row, in words. Only what both of two wrote is compared."""
    defaults = {**PROTOCOL, "hparams": None}
    args_of = [member.args if isinstance(member, Run) else defaults | member.job.args for member in members]
    overrides_of = [overrides(args) for args in args_of]
    names = dict.fromkeys(name for each in overrides_of for name in each or ())
    found = []
    for member, args, own in zip(members, args_of, overrides_of, strict=True):
        values = {name: args[name] for name in PROTOCOL if name in args}
        if own is not None:
            values |= {name: own.get(name) for name in names if name in own or name not in WEIGHTS}
        if isinstance(member, Run):
            values |= {name: member.hparams.get(name, "none") for name in WEIGHTS if member.hparams}
            values |= {} if member.image_size is None else {"image_size": member.image_size}
        found.append({name: words(value) for name, value in values.items()})
    return found


def overrides(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `--hparams` of a run sets, however it was typed; None where its arguments do not say."""
    if "hparams" not in args:
        return None
    try:
        found = json.loads(args["hparams"] or "{}")
    except (TypeError, ValueError):
        found = args["hparams"]
    return found if isinstance(found, dict) else {"hparams": found}


def words(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "default"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
