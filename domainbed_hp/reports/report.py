"""All that the formats show: tables, what they lack, and where their numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from domainbed_hp import registry
from domainbed_hp.model_selection import METHODS, SelectionMethod
from domainbed_hp.reports import tables
from domainbed_hp.reports.load import Collected
from domainbed_hp.reports.missing import Missing, describe, find_missing
from domainbed_hp.reports.published import PublishedTable
from domainbed_hp.reports.tables import Table


@dataclass
class Report:
    """Tables of one collection of runs under every selection method, the same method's together."""

    tables: list[Table]
    num_records: int
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the tables do not tell."""
    provenance: dict[str, Any] = field(default_factory=dict)
    no_runs: list[str] = field(default_factory=list)
    """Rows that have nothing on a data set that others have something on."""
    published: list[PublishedTable] = field(default_factory=list)

    def by_method(self) -> Iterator[tuple[SelectionMethod, list[Table]]]:
        for _, group in groupby(self.tables, key=lambda table: table.method.name):
            each = list(group)
            yield each[0].method, each

    def lacking(self, table: Table) -> list[str]:
        """The jobs that would complete the marked cells of a table, in words."""
        return describe(
            each
            for each in self.missing
            if each.row in table.rows
            and table.dataset in (None, each.dataset)
            and any(each.completes(each.row, each.dataset, env, table.method) for env in each.test_envs)
        )


def make(collected: Collected, cost_names: Sequence[str] = ()) -> Report:
    """The report of what was collected."""
    missing = find_missing(collected)
    built = [t for method in METHODS for t in tables.build(collected, method, missing, cost_names)]
    notes = (
        collected.notes
        + unknown(collected)
        + terms(collected)
        + fewer(collected)
        + tables.unpaired(built, collected.frame)
    )
    folders = {run.folder for run in collected.runs}
    started = sum(not planned.done and str(planned.job.folder) in folders for planned in collected.planned)
    if started:
        notes.append(f"{started} jobs are not done; what they have recorded so far is counted")
    no_runs = tables.no_runs(built, collected.frame)
    return Report(built, len(collected.frame), missing, notes, provenance(collected), no_runs)


def unknown(collected: Collected) -> list[str]:
    """What the registry does not know, a line each."""
    datasets, algorithms = (
        sorted(set(collected.frame[name]) - set(known))
        for name, known in (("dataset", registry.DATASETS), ("algorithm", registry.ALGORITHMS))
    )
    return [f"data set {name!r} is not registered: its environments are numbered" for name in datasets] + [
        f"algorithm {name!r} is not registered: its rows come last" for name in algorithms
    ]


TERMS = {
    "transductive": "predicts from all images of a test batch (transductive)",
    "source_free": "never trained on images (source-free)",
}


def terms(collected: Collected) -> list[str]:
    """Rows whose numbers stand under other terms than training on the sources and predicting image by image."""
    rows = {name: dict.fromkeys(run.row for run in collected.runs if run.protocol.get(name)) for name in TERMS}
    return [f"{', '.join(found)}: {TERMS[name]}" for name, found in rows.items() if found]


def fewer(collected: Collected) -> list[str]:
    """Rows that have fewer trials than others because their sweep says so."""
    most = collected.frame["trial_seed"].nunique() if len(collected.frame) else 0
    planned = {label: collected.trials_of(label) for label in collected.row_plan}
    few = [f"{label} ({n})" for label, n in planned.items() if n and n < most]
    return [f"fewer trials than {most}, as planned: {', '.join(few)}"] if few else []


def provenance(collected: Collected) -> dict[str, Any]:
    """Where the numbers come from: what was launched, and what it ran on."""
    seen: dict[str, set[str]] = {}
    for run in collected.runs:
        for versions in run.versions:
            for name, value in versions.items():
                seen.setdefault(name, set()).add(str(value))
    return {
        "records": len(collected.frame),
        "runs": len(collected.runs),
        "versions": {name: sorted(values) for name, values in sorted(seen.items())},
        "sweeps": collected.sweeps,
    }
