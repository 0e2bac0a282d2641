"""Find the jobs that the tables lack, and the cells that they would complete.

Expected are the jobs that a sweep lists, and for every row and data set all trials that any row has on this data set
(or as many as the sweep plans for the row), each with the test environments and hparams seeds of the row. A job that a
sweep lists is missing until it is done, any other until it has a record of the last step of its row on this data set.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from domainbed_hp.model_selection import SelectionMethod
from domainbed_hp.reports.load import CollectedRuns
from domainbed_hp.run_args import REMOVED, name_flags
from domainbed_hp.seeds import seed_hash
from domainbed_hp.sweep.jobs import Job

Key = tuple[tuple[int, ...], int, int]
"""(test_envs, trial_seed, hparams_seed)."""


@dataclass(frozen=True)
class MissingJob:
    """A job that a row of the tables lacks."""

    row: str
    job: Job

    @property
    def dataset(self) -> str:
        return str(self.job.args["dataset"])

    @property
    def test_envs(self) -> tuple[int, ...]:
        return tuple(self.job.args["test_envs"])

    def completes(self, env: int, method: type[SelectionMethod]) -> bool:
        """Return whether the cell of this row and test environment `env` lacks this job under the method."""
        return env in self.test_envs and len(self.test_envs) in method.num_test_envs


def find_missing(collected: CollectedRuns) -> list[MissingJob]:
    """Return the missing jobs, ordered by row, data set, trial, test environments and hparams seed."""
    args_of: dict[tuple[str, str], dict[Key, dict[str, Any]]] = defaultdict(dict)
    planned: dict[tuple[str, str], dict[Key, tuple[Job, bool]]] = defaultdict(dict)
    last_step: dict[tuple[str, str], dict[Key, int]] = defaultdict(dict)
    folders: dict[tuple[str, str], Path] = {}
    labels: dict[str, str] = {}
    trials: dict[str, set[int]] = defaultdict(set)
    num_envs: dict[str, int] = defaultdict(int)
    maxima = collected.frame.groupby("run")[["num_envs", "step"]].max().to_numpy()
    for i, run in enumerate(collected.runs):
        dataset = run.args["dataset"]
        place, key = (run.row, dataset), make_key(run.args)
        args_of[place][key] = run.args
        labels[run.row] = run.label
        last_step[place][key] = max(last_step[place].get(key, 0), int(maxima[i, 1]))
        folders.setdefault(place, Path(run.folder).parent)
        num_envs[dataset] = max(num_envs[dataset], int(maxima[i, 0]))
    for plan in collected.planned:
        place = plan.row, plan.job.args["dataset"]
        planned[place][make_key(plan.job.args)] = plan.job, plan.done
        labels[plan.row] = plan.job.row
        folders[place] = plan.job.folder.parent
    for place in [*args_of, *planned]:
        trials[place[1]] |= {trial for _, trial, _ in [*args_of[place], *planned[place]]}

    missing = []
    for place in dict.fromkeys([*args_of, *planned]):
        row, dataset = place
        keys = [*args_of[place], *planned[place]]
        envs = {(i,) for i in range(num_envs[dataset])} | {envs for envs, _, _ in keys}
        if any(len(e) == 2 for e in envs):  # a row with one pair of test environments should have all pairs
            envs |= {(i, j) for i in range(num_envs[dataset]) for j in range(i + 1, num_envs[dataset])}
        row_trials = sorted(trials[dataset])[: collected.count_planned_trials(labels[row])]
        for trial, test_envs, seed in product(row_trials, sorted(envs), sorted({seed for _, _, seed in keys})):
            key = test_envs, trial, seed
            if key in planned[place]:
                job, done = planned[place][key]
                if not done:
                    missing.append(MissingJob(row, job))
            elif last_step[place].get(key, -1) < max(last_step[place].values(), default=0):
                example = planned[place][keys[-1]][0].args if planned[place] else args_of[place][keys[-1]]
                missing.append(MissingJob(row, make_job(example, key, folders[place])))
    return missing


def make_key(args: dict[str, Any]) -> Key:
    """Return (test_envs, trial_seed, hparams_seed) of a run's arguments, the environments sorted."""
    return tuple(sorted(args["test_envs"])), args["trial_seed"], args["hparams_seed"]


def make_job(example: dict[str, Any], key: Key, output_dir: Path) -> Job:
    """Return the job with the arguments of an example, and the test environments and seeds of `key`."""
    test_envs, trial, hparams_seed = key
    seed = seed_hash(example["dataset"], example["algorithm"], list(test_envs), hparams_seed, trial)
    args = {name: value for name, value in name_flags(example).items() if name != "output_dir" and value}
    args = {name: value for name, value in args.items() if (name, value) not in REMOVED.items()}
    seeds = {"test_envs": list(test_envs), "trial_seed": trial, "hparams_seed": hparams_seed, "seed": seed}
    return Job.create(output_dir, {**args, **seeds})


def describe_jobs(missing: Iterable[MissingJob]) -> list[str]:
    """Return a line for all hparams seeds of the same row, data set, trial and test environments."""
    seeds: dict[tuple[str, str, str, int], list[int]] = defaultdict(list)
    for job in missing:
        envs = ",".join(map(str, job.test_envs))
        seeds[job.row, job.dataset, envs, job.job.args["trial_seed"]].append(job.job.args["hparams_seed"])
    return [
        f"{row}, {dataset}, test_envs {envs}, trial {trial}, hparams_seed {format_ranges(numbers)}"
        for (row, dataset, envs, trial), numbers in seeds.items()
    ]


def format_ranges(numbers: Sequence[int]) -> str:
    """Return e.g. `0-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def list_jobs(missing: Sequence[MissingJob]) -> dict[str, Any]:
    """Return the content of a file for `sweep launch --jobs`."""
    return {"jobs": [{"output_dir": str(item.job.folder.parent), "args": item.job.args} for item in missing]}
