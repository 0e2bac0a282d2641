"""Time of `collect_results` and `sweep status` on large sweeps, whole processes.

    python benchmarks/reports.py

How: sweeps are written into a temporary folder (TMPDIR says where). `collect_results` reads 2,400 runs of 17 records
(66 MB), in turn with a script that does no more than import pandas and parse the same files with orjson; each round
gives a ratio. `sweep status` reads 1,000 jobs that are done, failed or incomplete, then 10,000 jobs that are done,
three times each.

Runtime on one core: 1 minute.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import numpy as np
from common import format_spread, interleave

from domainbed_hp import run_dir

STEPS = 17
COLLECT = [sys.executable, "-m", "domainbed_hp.scripts.collect_results", "--input_dir"]
STATUS = [sys.executable, "-m", "domainbed_hp.scripts.sweep", "status", "--output_dir"]
PARSE = """
import sys, pathlib, orjson, pandas
for path in pathlib.Path(sys.argv[1]).glob("*/results.jsonl"):
    for line in path.read_bytes().splitlines():
        orjson.loads(line)
"""
FILES = ((run_dir.DONE, "done"), (run_dir.ERROR, "Traceback\n" * 40 + "RuntimeError: why\n"), ("out.txt", "Args:\n"))
"""A file that makes a job done, failed or incomplete."""


def write_runs(folder: Path, count: int) -> None:
    """Write runs whose records are as large as those of `train`."""
    rng = np.random.default_rng(0)
    cells = product(range(3), ("ERM", "LoRA", "HeadPurification"), ("PACS", "VLCS"), range(40))
    envs = [[i] for i in range(4)] + [[i, j] for i in range(4) for j in range(i + 1, 4)]
    for name, ((trial, algorithm, dataset, hparams_seed), test_envs) in enumerate(islice(product(cells, envs), count)):
        args = {"algorithm": algorithm, "dataset": dataset, "trial_seed": trial, "hparams_seed": hparams_seed}
        args |= {"test_envs": test_envs, "data_dir": "/data", "output_dir": f"{folder}/{name}", "steps": 5001}
        args |= {f"another_{i}": None for i in range(18)}
        hparams = {f"hparam_{i}": float(rng.random()) for i in range(20)}
        lines = []
        for step in range(STEPS):
            accs = {f"env{i}_{split}_acc": float(rng.random()) for i in range(4) for split in ("in", "out")}
            numbers = {"step": 300 * step, "epoch": 1.5 * step, "loss": float(rng.random()), "step_time": 0.2}
            record = numbers | accs | {"mem_gb": 1.0, "args": args, "hparams": hparams}
            lines.append(json.dumps(record | {"versions": {"python": "3.11.7", "torch": "2.9.1"}}, sort_keys=True))
        (folder / str(name)).mkdir(parents=True)
        (folder / str(name) / "results.jsonl").write_text("\n".join(lines) + "\n")


def write_jobs(folder: Path, count: int, files: int) -> None:
    """Write a sweep of jobs that are, in turn, in the states of the first `files` entries of FILES."""
    jobs = []
    for i in range(count):
        args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [i % 4], "trial_seed": i // 4, "hparams_seed": 0}
        jobs.append({"folder": f"{i:032x}", "args": args | {"holdout_fraction": 0.2, "seed": i}})
        name, text = FILES[i % files]
        (folder / f"{i:032x}").mkdir(parents=True)
        (folder / f"{i:032x}" / name).write_text(text)
    rows = [{"algorithm": "ERM", "label": "ERM", "hparams": {}}]
    sweep = {"version": "0", "spec": {"output_dir": str(folder)}, "rows": rows, "jobs": jobs}
    (folder / "sweep.json").write_text(json.dumps(sweep))


def time_process(command: list[str], folder: Path) -> float:
    """Return the seconds of a process."""
    start = time.perf_counter()
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of collect_results and the parser")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_runs(root, 2400)
        commands = {"ours": COLLECT, "parse": [sys.executable, "-c", PARSE]}
        ways = {name: lambda _, command=command: time_process(command, root) for name, command in commands.items()}
        ours, parse = interleave(ways, rounds).values()
    print(f"collect_results, 2,400 runs of {STEPS} records: {np.median(ours):.2f} s; ", end="")
    print(f"pandas and orjson alone {np.median(parse):.2f} s; ratio {format_spread(np.divide(ours, parse))}")
    for count, files in ((1000, len(FILES)), (10_000, 1)):
        with tempfile.TemporaryDirectory() as folder:
            write_jobs(Path(folder), count, files)
            seconds = [time_process(STATUS, Path(folder)) for _ in range(3)]
        print(f"sweep status, {count:,} jobs: {np.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
