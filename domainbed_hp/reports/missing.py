"""Which jobs are missing, and what each would complete.

Expected are the jobs that a sweep lists; and for every row and data set, the trials that the data set has anywhere (or
as many as the sweep plans for it), each with the test environments and hparams seeds of that row. A job is missing
unless it is done; one that no sweep lists, unless its last record is of the same step as the last of its row on this
data set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from domainbed_hp.model_selection import LeaveOneOut, SelectionMethod
from domainbed_hp.reports.load import Collected
from domainbed_hp.run_args import REMOVED, name_flags
from domainbed_hp.seeds import seed_hash
from domainbed_hp.sweep.jobs import Job

Key = tuple[tuple[int, ...], int, int]
"""(test_envs, trial_seed, hparams_seed)."""


@dataclass(frozen=True)
class Missing:
    """A job that a table lacks; `row` as in the table."""

    row: str
    job: Job

    @property
    def dataset(self) -> str:
        return str(self.job.args["dataset"])

    @property
    def test_envs(self) -> tuple[int, ...]:
        return tuple(self.job.args["test_envs"])

    def completes(self, row: str, dataset: str, env: int, method: SelectionMethod) -> bool:
        """Whether the cell of (row, dataset, test environment) under a selection method is made of this job, too."""
        pair = len(self.test_envs) == 2 and method is LeaveOneOut
        return (
            (row, dataset) == (self.row, self.dataset) and env in self.test_envs and (pair or len(self.test_envs) == 1)
        )


def find_missing(collected: Collected) -> list[Missing]:
    """In the order of rows as they came, data sets, trials, test environments and hparams seeds."""
    have: dict[tuple[str, str], dict[Key, dict[str, Any]]] = defaultdict(dict)
    planned: dict[tuple[str, str], dict[Key, tuple[Job, bool]]] = defaultdict(dict)
    folders: dict[tuple[str, str], Path] = {}
    labels: dict[str, str] = {}
    trials: dict[str, set[int]] = defaultdict(set)
    of_run = collected.frame.groupby("run")[["num_envs", "step"]].max().to_numpy()
    last: dict[tuple[str, str], dict[Key, int]] = defaultdict(dict)
    count: dict[str, int] = defaultdict(int)
    for i, run in enumerate(collected.runs):
        place = run.row, run.args["dataset"]
        k = key(run.args)
        have[place][k] = run.args
        labels[run.row] = run.label
        last[place][k] = max(last[place].get(k, 0), int(of_run[i, 1]))
        folders.setdefault(place, Path(run.folder).parent)
        count[run.args["dataset"]] = max(count[run.args["dataset"]], int(of_run[i, 0]))
    for plan in collected.planned:
        place = plan.row, plan.job.args["dataset"]
        planned[place][key(plan.job.args)] = plan.job, plan.done
        labels[plan.row] = plan.job.row
        folders[place] = plan.job.folder.parent
    for place in [*have, *planned]:
        trials[place[1]] |= {trial for _, trial, _ in [*have[place], *planned[place]]}

    found = []
    for place in dict.fromkeys([*have, *planned]):
        row, dataset = place
        keys = [*have[place], *planned[place]]
        envs = {(i,) for i in range(count[dataset])} | {envs for envs, _, _ in keys}
        if any(len(e) == 2 for e in envs):  # who has a pair wants all
            envs |= {(i, j) for i in range(count[dataset]) for j in range(i + 1, count[dataset])}
        of_row = sorted(trials[dataset])[: collected.trials_of(labels[row])]
        expected = product(of_row, sorted(envs), sorted({seed for _, _, seed in keys}))
        for trial, test_envs, hparams_seed in expected:
            k = test_envs, trial, hparams_seed
            if k in planned[place]:
                job, done = planned[place][k]
                if not done:
                    found.append(Missing(row, job))
            elif last[place].get(k, -1) < max(last[place].values(), default=0):
                like = planned[place][keys[-1]][0].args if planned[place] else have[place][keys[-1]]
                found.append(Missing(row, alike(like, k, folders[place])))
    return found


def key(args: dict[str, Any]) -> Key:
    return tuple(sorted(args["test_envs"])), args["trial_seed"], args["hparams_seed"]


def alike(args: dict[str, Any], k: Key, output_dir: Path) -> Job:
    """The job of a sweep that differs from the run with these arguments in its test environments and seeds alone."""
    test_envs, trial, hparams_seed = k
    dataset, algorithm = args["dataset"], args["algorithm"]
    seed = seed_hash(dataset, algorithm, list(test_envs), hparams_seed, trial)
    kept = {name: value for name, value in name_flags(args).items() if name != "output_dir" and value}
    kept = {name: value for name, value in kept.items() if (name, value) not in REMOVED.items()}
    new = {"test_envs": list(test_envs), "trial_seed": trial, "hparams_seed": hparams_seed, "seed": seed}
    return Job.create(output_dir, {**kept, **new})


def describe(missing: Iterable[Missing]) -> list[str]:
    """One line for all hparams seeds of the same row, data set, trial and test environments."""
    seeds: dict[tuple[str, str, str, int], list[int]] = defaultdict(list)
    for each in missing:
        envs = ",".join(map(str, each.test_envs))
        seeds[each.row, each.dataset, envs, each.job.args["trial_seed"]].append(each.job.args["hparams_seed"])
    return [
        f"{row}, {dataset}, test_envs {envs}, trial {trial}, hparams_seed {ranges(numbers)}"
        for (row, dataset, envs, trial), numbers in seeds.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """E.g. `0-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def launchable(missing: Sequence[Missing]) -> dict[str, Any]:
    """What `sweep launch --jobs` reads."""
    return {"jobs": [{"output_dir": str(each.job.folder.parent), "args": each.job.args} for each in missing]}
