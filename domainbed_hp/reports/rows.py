"""Runs and planned jobs, and their rows of the tables: runs of different protocols never share a row."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from domainbed_hp.run_args import PROTOCOL, REMOVED
from domainbed_hp.sweep.jobs import Job

WEIGHTS = ("clip_model", "clip_pretrained", "backbone")
"""Hparams that name the pretrained weights of a run."""


@dataclass
class Run:
    """One run, with the facts that its records share."""

    folder: str
    args: dict[str, Any]
    hparams: dict[str, Any] = field(default_factory=dict)
    versions: list[dict[str, Any]] = field(default_factory=list)
    """Versions, commit and hardware; several, in order, if the run was resumed under others."""
    image_size: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    """Conditions under which the run was trained and scored, e.g. {"weights": ..., "transductive": True}."""
    row: str = ""
    """The run's row of the tables."""

    @property
    def label(self) -> str:
        return str(self.args.get("label") or self.args["algorithm"])


@dataclass
class PlannedJob:
    """A job that a sweep.json lists, and its row of the tables."""

    job: Job
    done: bool
    row: str = ""


def assign_rows(runs: Sequence[Run], planned: Sequence[PlannedJob]) -> list[str]:
    """Set `row` of every run and planned job. Return a note for each label whose runs have different protocols.

    A row is named by its label. Where runs of one label on one data set differ in their protocol, the differing
    values follow in brackets, e.g. `ERM (steps=100)`.
    """
    # DEVIATION: DomainBed merges all runs of equal dataset, algorithm, test_envs and seeds, without a warning.
    groups: dict[tuple[str, str], tuple[list[Run], list[PlannedJob]]] = defaultdict(lambda: ([], []))
    for run in runs:
        groups[run.label, run.args["dataset"]][0].append(run)
    for plan in planned:
        groups[plan.job.row, plan.job.args["dataset"]][1].append(plan)
    notes = []
    for (label, dataset), (own_runs, own_jobs) in groups.items():
        protocols = list_protocols(own_runs, own_jobs)
        values_of: dict[str, set[str]] = defaultdict(set)
        for protocol in protocols:
            for name, value in protocol.items():
                values_of[name].add(value)
        differing = [name for name, values in values_of.items() if len(values) > 1]
        members: list[Run | PlannedJob] = [*own_runs, *own_jobs]
        for member, protocol in zip(members, protocols, strict=True):
            shown = ", ".join(f"{name}={protocol.get(name, 'unknown')}" for name in differing)
            member.row = f"{label} ({shown})" if shown else label
        assign_planned_rows(own_runs, own_jobs, protocols)
        if differing:
            counts = Counter(run.row for run in own_runs)
            rows = ", ".join(f"{row!r} ({number} runs)" for row, number in counts.items())
            names = ", ".join(differing)
            notes.append(f"runs of {label!r} on {dataset} differ in {names}, so each value has its own row: {rows}")
    return notes


def assign_planned_rows(
    runs: Sequence[Run], planned: Sequence[PlannedJob], protocols: Sequence[Mapping[str, str]]
) -> None:
    """Give a planned job the row of its run, or else the only row whose protocol agrees with the job's.

    `protocols` are those of the runs, then those of the planned jobs.
    """
    row_of_folder = {run.folder: run.row for run in runs}
    protocol_of_row = {run.row: protocol for run, protocol in zip(runs, protocols, strict=False)}
    for plan, protocol in zip(planned, protocols[len(runs) :], strict=True):
        pairs = protocol_of_row.items()
        rows = [row for row, other in pairs if all(other.get(name, v) == v for name, v in protocol.items())]
        plan.row = row_of_folder.get(str(plan.job.folder), rows[0] if len(rows) == 1 else plan.row)


def list_protocols(runs: Sequence[Run], planned: Sequence[PlannedJob]) -> list[dict[str, str]]:
    """Return the protocols of runs, then of planned jobs: name of a setting -> its value as text.

    A setting that a record lacks has no entry, and differs from no other.
    """
    settings: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
    for run in runs:
        model = {name: run.hparams.get(name, "none") for name in WEIGHTS if run.hparams}
        settings.append((run.args, model if run.image_size is None else model | {"image_size": run.image_size}))
    settings += [({**PROTOCOL, "hparams": None, **plan.job.args}, {}) for plan in planned]
    overrides = [parse_overrides(args) for args, _ in settings]
    names = dict.fromkeys(name for values in overrides for name in values or ())
    protocols = []
    for (args, model), own in zip(settings, overrides, strict=True):
        values = REMOVED | {name: args[name] for name in PROTOCOL if name in args}
        if own is not None:
            values |= {name: own.get(name) for name in names if name in own or name not in WEIGHTS}
        protocols.append({name: format_value(value) for name, value in (values | model).items()})
    return protocols


def parse_overrides(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values that the argument `hparams` of a run sets; None if the arguments lack it."""
    if "hparams" not in args:
        return None
    try:
        overrides = json.loads(args["hparams"] or "{}")
    except (TypeError, ValueError):
        overrides = args["hparams"]
    return overrides if isinstance(overrides, dict) else {"hparams": overrides}


def format_value(value: object) -> str:
    """Return the value of a setting as a table shows it."""
    if value is None:
        return "default"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
