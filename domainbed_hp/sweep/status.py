"""How far a sweep is and what the rest of it costs, from the files of its jobs; no torch, no pandas."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from domainbed_hp import run_dir
from domainbed_hp.records import last_record
from domainbed_hp.run_dir import State
from domainbed_hp.sweep.jobs import Job, launchers

RECENT = 50
"""Jobs done last, by which the rate goes."""
SHOWN = (State.DONE, State.RUNNING, State.FAILED, State.INCOMPLETE, State.NOT_LAUNCHED)
ALWAYS = (State.DONE, State.INCOMPLETE, State.NOT_LAUNCHED)
"""The states of DomainBed: its summary counts them, be they 0."""


@dataclass(frozen=True)
class Progress:
    """A sweep at one moment."""

    jobs: Sequence[Job]
    states: Sequence[State]
    jobs_per_hour: float | None
    """None: nothing is running, or nothing is done yet."""
    launchers: int
    """At work on it."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> "Progress":
        states = [job.state for job in jobs]
        began = launchers(jobs[0].folder.parent) if jobs else []
        per_hour = None
        if State.RUNNING in states:
            done = [job.folder / run_dir.DONE for job, state in zip(jobs, states, strict=True) if state == State.DONE]
            per_hour = rate([path.stat().st_mtime for path in done], time.time(), min(began, default=0.0))
        return cls(jobs, states, per_hour, len(began))

    @property
    def count(self) -> Counter[State]:
        return Counter(self.states)

    @property
    def eta_s(self) -> float | None:
        """Seconds until nothing but failures is left, if the rest is like the jobs done last."""
        left = len(self.jobs) - self.count[State.DONE] - self.count[State.FAILED]
        return None if self.jobs_per_hour is None else 3600 * left / self.jobs_per_hour

    def among(self, *states: State) -> list[Job]:
        return [job for job, state in zip(self.jobs, self.states, strict=True) if state in states]

    def lines(self, *states: State) -> list[str]:
        """One line per job in one of `states`."""
        described = zip(self.jobs, self.states, strict=True)
        return [job.describe(state) for job, state in described if state in states]

    def summary(self) -> str:
        """One line, as DomainBed's; the states that it does not know are told where there are any."""
        count = self.count
        parts = [f"{count[state]} {state.lower()}" for state in SHOWN if state in ALWAYS or count[state]]
        return f"{len(self.jobs)} jobs: {', '.join(parts)}."

    def table(self) -> str:
        """States counted by row and data set; empty where all jobs are of one."""
        states = [state for state in SHOWN if state in self.states]
        cells = [[*key, *(count[state] or None for state in states)] for key, count in self.by_row().items()]
        return tabulate(cells, ["row", "data set", *(s.lower() for s in states)]) if len(cells) > 1 else ""

    def speed(self) -> str:
        """One line on the rate; empty where nobody is at work."""
        if self.jobs_per_hour is None or self.eta_s is None:
            return "At work; the rate shows once a job is done." if self.launchers or self.count[State.RUNNING] else ""
        return f"{self.jobs_per_hour:.3g} jobs an hour: at this rate the rest is done in {duration(self.eta_s)}."

    def by_row(self) -> dict[tuple[str, str], Counter[State]]:
        counts: dict[tuple[str, str], Counter[State]] = defaultdict(Counter)
        for job, state in zip(self.jobs, self.states, strict=True):
            counts[job.row, job.args["dataset"]][state] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""

        def named(count: Counter[State]) -> dict[str, int]:
            return {state.name.lower(): count[state] for state in SHOWN}

        listed = []
        for job, state in zip(self.jobs, self.states, strict=True):
            error = {"error": run_dir.read_failure(job.folder)} if state == State.FAILED else {}
            listed.append({"folder": str(job.folder), "state": state.name.lower(), **error, "args": job.args})
        return {
            "total": len(self.jobs),
            **named(self.count),
            "launchers": self.launchers,
            "jobs_per_hour": self.jobs_per_hour,
            "eta_s": self.eta_s,
            "rows": [{"row": row, "dataset": of, **named(count)} for (row, of), count in self.by_row().items()],
            "jobs": listed,
        }


def rate(done: Sequence[float], now: float, began: float = 0.0) -> float | None:
    """Jobs an hour, of those done last and since the launchers at work `began`: before, the sweep may have paused.

    None where that is none.
    """
    recent = sorted(done)[-RECENT:]
    if len(done) > RECENT or not began:
        began = max([began, *recent[:1]])
    count = sum(at > began for at in recent)
    return 3600 * count / (now - began) if count and now > began else None


def estimate(jobs: Sequence[Job], finished: Sequence[Job], parallel: int | None = None) -> str:
    """What `jobs` cost, in words, by the median of what the `finished` ones took.

    Of those of the same row and data set, else of the same algorithm, else of all.
    """
    took: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for job in finished:
        seconds = elapsed(job.folder)
        if seconds is not None:
            for key in keys(job):
                took[key].append(seconds)
    if not took:
        return "No estimate of the cost: no job of this sweep is done that says how long it took."
    used = [next(key for key in keys(job) if key in took) for job in jobs]
    total = sum(median(took[key]) for key in used)
    at_once = f", {duration(total / parallel)} with {parallel} at a time" if parallel else ""
    names = {2: "its row and data set", 1: "its algorithm", 0: "all"}
    by = [f"{n} by {names[size]}" for size, n in sorted(Counter(map(len, used)).items(), reverse=True)]
    basis = f"from {len(took[()])} that are done; {', '.join(by)}" if by else f"from {len(took[()])} that are done"
    return f"Cost: about {duration(total)} of one job after another{at_once} (estimated {basis})."


def keys(job: Job) -> list[tuple[str, ...]]:
    """Whom a job is like, the closest first."""
    return [(job.row, job.args["dataset"]), (job.args["algorithm"],), ()]


def elapsed(folder: Path) -> float | None:
    """Seconds that a run took, by its last record; None where that does not say: records of DomainBed do not."""
    seconds = (last_record(folder) or {}).get("elapsed_s")
    return float(seconds) if isinstance(seconds, int | float) else None


def duration(seconds: float) -> str:
    """In words, two units at most."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
