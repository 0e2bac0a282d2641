"""The report: tables, the jobs that they lack, and the origin of their numbers. Every format is made from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from domainbed_hp import registry
from domainbed_hp.model_selection import SelectionMethod, load_selection_methods
from domainbed_hp.reports import tables
from domainbed_hp.reports.load import CollectedRuns
from domainbed_hp.reports.missing import MissingJob, describe_jobs, find_missing
from domainbed_hp.reports.published import PublishedTable
from domainbed_hp.reports.tables import Table


@dataclass
class Report:
    """Tables of one collection of runs under every selection method; tables of one method follow each other."""

    tables: list[Table]
    num_records: int
    missing: list[MissingJob] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Warnings for the user about numbers in the tables."""
    provenance: dict[str, Any] = field(default_factory=dict)
    absent_rows: list[str] = field(default_factory=list)
    """A line for every row without a run on a data set that other rows have runs on."""
    published: list[PublishedTable] = field(default_factory=list)

    def group_by_method(self) -> Iterator[tuple[type[SelectionMethod], list[Table]]]:
        """Yield (selection method, its tables)."""
        for _, group in groupby(self.tables, key=lambda table: table.method.key):
            members = list(group)
            yield members[0].method, members

    def list_missing(self, table: Table) -> list[str]:
        """Return lines on the jobs that would complete the marked cells of a table."""
        return describe_jobs(
            job
            for job in self.missing
            if job.row in table.rows
            and table.dataset in (None, job.dataset)
            and any(job.completes(env, table.method) for env in job.test_envs)
        )


def make_report(collected: CollectedRuns, statistics: Sequence[str] = ()) -> Report:
    """Return the report of collected runs; `statistics` names columns, see `tables.make_statistics`.

    Raises:
        UsageError: a statistic is neither one of `tables.COSTS` nor a number of the records.
    """
    tables.check_keys(collected.frame, statistics, list(tables.COSTS))
    missing = find_missing(collected)
    built = [t for m in load_selection_methods() for t in tables.build_tables(collected, m, missing, statistics)]
    notes = [
        *collected.notes,
        *describe_unregistered(collected),
        *describe_conditions(collected),
        *describe_short_rows(collected),
        *tables.explain_empty_cells(built, collected.frame),
    ]
    folders = {run.folder for run in collected.runs}
    started = sum(not plan.done and str(plan.job.folder) in folders for plan in collected.planned)
    if started:
        notes.append(f"{started} jobs are not done; their records so far are counted")
    absent_rows = tables.describe_absent_rows(built, collected.frame)
    return Report(built, len(collected.frame), missing, notes, make_provenance(collected), absent_rows)


def describe_unregistered(collected: CollectedRuns) -> list[str]:
    """Return a line for every data set and algorithm that the registry does not know."""
    datasets, algorithms = (
        sorted(set(collected.frame[name]) - set(known))
        for name, known in (("dataset", registry.DATASETS), ("algorithm", registry.ALGORITHMS))
    )
    hint = "; --import MODULE registers it"
    return [
        f"data set {name!r} is not registered: its environments are numbered" + hint * (not name.startswith("folder:"))
        for name in datasets
    ] + [f"algorithm {name!r} is not registered: its rows come last{hint}" for name in algorithms]


CONDITIONS = {
    "transductive": "predicts from all images of a test batch (transductive)",
    "source_free": "never trained on images (source-free)",
}
"""Key of a run's protocol -> an unusual condition in words."""


def describe_conditions(collected: CollectedRuns) -> list[str]:
    """Return a line for every unusual condition, with its rows."""
    rows = {name: dict.fromkeys(run.row for run in collected.runs if run.protocol.get(name)) for name in CONDITIONS}
    return [f"{', '.join(names)}: {CONDITIONS[name]}" for name, names in rows.items() if names]


def describe_short_rows(collected: CollectedRuns) -> list[str]:
    """Return a line on the rows for which a sweep plans fewer trials than others have, if there are any."""
    most = collected.frame["trial_seed"].nunique() if len(collected.frame) else 0
    planned = {label: collected.count_planned_trials(label) for label in collected.planned_labels}
    short = [f"{label} ({n})" for label, n in planned.items() if n and n < most]
    return [f"rows with fewer than {most} trials, as planned: {', '.join(short)}"] if short else []


def make_provenance(collected: CollectedRuns) -> dict[str, Any]:
    """Return the number of records and runs, the versions that they were made with, and the sweeps."""
    versions: dict[str, set[str]] = {}
    for run in collected.runs:
        for entry in run.versions:
            for name, value in entry.items():
                versions.setdefault(name, set()).add(str(value))
    return {
        "records": len(collected.frame),
        "runs": len(collected.runs),
        "versions": {name: sorted(values) for name, values in sorted(versions.items())},
        "sweeps": collected.sweeps,
    }
