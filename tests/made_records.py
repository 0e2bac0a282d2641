"""Records, runs and sweeps that tests of the reports are made of."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from domainbed_hp.reports.load import CollectedRuns, collect_records
from domainbed_hp.sweep.jobs import Job

Record = dict[str, Any]


def minimal(**args: Any) -> Record:
    """The least that DomainBed's collector accepts."""
    args = {"algorithm": "ERM", "dataset": "PACS", "hparams_seed": 0, "test_envs": [0], "trial_seed": 0, **args}
    outs = {f"env{i}_out_acc": 0.5 for i in range(3)}
    return {"args": args, "step": 0, **outs, **{f"env{i}_in_acc": 0.25 for i in args["test_envs"]}}


def record(env: int, test_acc: float, trial_seed: int = 0, num_envs: int = 4, **args: Any) -> Record:
    """One record of a run that tests on `env`."""
    args = {"algorithm": "ERM", "dataset": "PACS", "label": None, "hparams_seed": 0, **args}
    outs = {f"env{i}_out_acc": 0.5 for i in range(num_envs)}
    args |= {"test_envs": [env], "trial_seed": trial_seed}
    return {"args": args, "step": 0, **outs, f"env{env}_in_acc": test_acc}


def collected(records: list[Record]) -> CollectedRuns:
    return collect_records((f"run{i}", record) for i, record in enumerate(records))


def frame(records: list[Record]) -> pd.DataFrame:
    return collected(records).frame


def write(folder: Path, *records: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def launched(output_dir: Path, args: list[dict[str, Any]], done: bool = True, num_envs: int = 4) -> list[Job]:
    """A sweep on disk, each of its jobs with one record, and done."""
    jobs = [Job.create(output_dir, {"holdout_fraction": 0.2, "hparams_seed": 0, "trial_seed": 0, **a}) for a in args]
    for job in jobs:
        accs = {f"env{i}_{split}_acc": 0.5 for i in range(num_envs) for split in ("in", "out")}
        write(job.folder, {"args": job.args, "step": 0, **accs})
        if done:
            (job.folder / "done").write_text("done")
    rows = list(dict.fromkeys((job.args["algorithm"], job.row) for job in jobs))
    listed = [{"algorithm": algorithm, "label": label, "hparams": {}} for algorithm, label in rows]
    entries = [{"folder": job.folder.name, "args": job.args} for job in jobs]
    sweep = {"version": "0", "spec": {"output_dir": str(output_dir)}, "rows": listed, "jobs": entries}
    (output_dir / "sweep.json").write_text(json.dumps(sweep))
    return jobs
