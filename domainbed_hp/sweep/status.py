"""Count the states of a sweep's jobs, and estimate the time of the rest. No torch or pandas is imported here."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from domainbed_hp import run_dir
from domainbed_hp.records import last_record
from domainbed_hp.run_dir import State
from domainbed_hp.sweep.jobs import Job, find_launchers

RECENT = 50
"""Number of the latest finished jobs in the rate."""
SHOWN = (State.DONE, State.RUNNING, State.FAILED, State.INCOMPLETE, State.NOT_LAUNCHED)
ALWAYS = (State.DONE, State.INCOMPLETE, State.NOT_LAUNCHED)
"""States that the summary shows even if no job has them, as DomainBed's."""


@dataclass(frozen=True)
class SweepStatus:
    """The states of a sweep's jobs at one moment."""

    jobs: Sequence[Job]
    states: Sequence[State]
    jobs_per_hour: float | None
    """None if no job is running, or none has finished since the first launcher at work started."""
    launchers: int
    """Number of launchers at work."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Self:
        """Read the states of `jobs` from their folders."""
        states = [job.state for job in jobs]
        launched = find_launchers(jobs[0].folder.parent) if jobs else []
        per_hour = None
        if State.RUNNING in states:
            done = [job.folder / run_dir.DONE for job, state in zip(jobs, states, strict=True) if state == State.DONE]
            finished = [path.stat().st_mtime for path in done]
            per_hour = compute_rate(finished, time.time(), min(launched, default=0.0))
        return cls(jobs, states, per_hour, len(launched))

    @property
    def count(self) -> Counter[State]:
        return Counter(self.states)

    @property
    def eta_s(self) -> float | None:
        """Seconds until all jobs but the failed ones are done, at the present rate."""
        left = len(self.jobs) - self.count[State.DONE] - self.count[State.FAILED]
        return None if self.jobs_per_hour is None else 3600 * left / self.jobs_per_hour

    def select_jobs(self, *states: State) -> list[Job]:
        return [job for job, state in zip(self.jobs, self.states, strict=True) if state in states]

    def list_jobs(self, *states: State) -> list[str]:
        """Return one line for each job that is in one of `states`."""
        pairs = zip(self.jobs, self.states, strict=True)
        return [job.describe(state) for job, state in pairs if state in states]

    def summarize(self) -> str:
        """Return one line with the number of jobs in each state, as DomainBed's."""
        count = self.count
        parts = [f"{count[state]} {state.lower()}" for state in SHOWN if state in ALWAYS or count[state]]
        return f"{len(self.jobs)} jobs: {', '.join(parts)}."

    def make_table(self) -> str:
        """Return the number of jobs in each state by row and data set as text; "" for a single row and data set."""
        states = [state for state in SHOWN if state in self.states]
        cells = [[*key, *(count[state] or None for state in states)] for key, count in self.count_by_row().items()]
        if len(cells) < 2:
            return ""
        from tabulate import tabulate

        return tabulate(cells, ["row", "data set", *(s.lower() for s in states)])

    def describe_rate(self) -> str:
        """Return one line on the rate and the time that is left; "" if no launcher is at work and no job is running."""
        if self.jobs_per_hour is None or self.eta_s is None:
            return "Running; the rate is known once one is done." if self.launchers or self.count[State.RUNNING] else ""
        left = format_duration(self.eta_s)
        return f"{self.jobs_per_hour:.3g} jobs an hour: at this rate the rest is done in {left}."

    def count_by_row(self) -> dict[tuple[str, str], Counter[State]]:
        """Return (row, data set) -> number of jobs in each state."""
        counts: dict[tuple[str, str], Counter[State]] = defaultdict(Counter)
        for job, state in zip(self.jobs, self.states, strict=True):
            counts[job.row, job.args["dataset"]][state] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return the whole status, for `status --json`."""

        def by_state(count: Counter[State]) -> dict[str, int]:
            return {state.name.lower(): count[state] for state in SHOWN}

        jobs = []
        for job, state in zip(self.jobs, self.states, strict=True):
            error = {"error": run_dir.read_failure(job.folder)} if state == State.FAILED else {}
            jobs.append({"folder": str(job.folder), "state": state.name.lower(), **error, "args": job.args})
        return {
            "total": len(self.jobs),
            **by_state(self.count),
            "launchers": self.launchers,
            "jobs_per_hour": self.jobs_per_hour,
            "eta_s": self.eta_s,
            "rows": [
                {"row": row, "dataset": name, **by_state(count)} for (row, name), count in self.count_by_row().items()
            ],
            "jobs": jobs,
        }


def compute_rate(finished: Sequence[float], now: float, start: float = 0.0) -> float | None:
    """Return the jobs per hour of late, from the times at which jobs finished; None if that is unknown.

    Only jobs after `start` count, when the first launcher at work started: before, the sweep may have paused.
    """
    recent = sorted(finished)[-RECENT:]
    if len(finished) > RECENT or not start:
        start = max([start, *recent[:1]])
    count = sum(at > start for at in recent)
    return 3600 * count / (now - start) if count and now > start else None


def estimate_cost(jobs: Sequence[Job], finished: Sequence[Job], parallel: int | None = None) -> str:
    """Return a sentence on how long `jobs` take, `parallel` at a time.

    The estimate for a job is the median time of the `finished` jobs that are most similar (`list_similar`).
    """
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for job in finished:
        seconds = read_elapsed(job.folder)
        if seconds is not None:
            for key in list_similar(job):
                times[key].append(seconds)
    if not times:
        return "No estimate of the cost: no finished job of this sweep has recorded its time."
    used = [next(key for key in list_similar(job) if key in times) for job in jobs]
    total = sum(median(times[key]) for key in used)
    at_once = f", {format_duration(total / parallel)} with {parallel} at a time" if parallel else ""
    names = {2: "jobs of the same row and data set", 1: "jobs of the same algorithm", 0: "all jobs"}
    by = [f"{n} from {names[size]}" for size, n in sorted(Counter(map(len, used)).items(), reverse=True)]
    basis = "; ".join([f"from {len(times[()])} finished jobs", *([", ".join(by)] if by else [])])
    return f"Cost: about {format_duration(total)}, one job at a time{at_once} (estimated {basis})."


def list_similar(job: Job) -> list[tuple[str, ...]]:
    """Return the keys of the groups of jobs similar to `job`: its row and data set, its algorithm, all."""
    return [(job.row, job.args["dataset"]), (job.args["algorithm"],), ()]


def read_elapsed(folder: Path) -> float | None:
    """Return the seconds that a run took, from its last record; None if it has no time, as DomainBed's."""
    seconds = (last_record(folder) or {}).get("elapsed_s")
    return float(seconds) if isinstance(seconds, int | float) else None


def format_duration(seconds: float) -> str:
    """Return a duration in its largest one or two units, for example `1 h 30 min`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
