"""How long `collect_results` takes, the whole process: `python benchmarks/collect.py`.

A sweep of 2,400 runs of 17 records (66 MB; 600 runs for the memory), in a temporary folder (TMPDIR says where). Beside
it a script that does no more than import pandas and parse the same files with orjson. The two take turns, each pair
gives a ratio. The growth of memory is that of the peak between 600 and 2,400 runs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import numpy as np

STEPS = 17
PARSE = """
import sys, pathlib, orjson, pandas
for path in pathlib.Path(sys.argv[2]).glob("*/results.jsonl"):
    for line in path.read_bytes().splitlines():
        orjson.loads(line)
"""
OURS = [sys.executable, "-m", "domainbed_hp.scripts.collect_results", "--input_dir"]
ROUNDS = 7


def sweep(folder: Path, count: int) -> int:
    """Write the runs, each record as large as those of `train` are; returns the number of bytes."""
    chance, size = np.random.default_rng(0), 0
    places = product(range(3), ("ERM", "LoRA", "HeadPurification"), ("PACS", "VLCS"), range(40))
    envs = [[i] for i in range(4)] + [[i, j] for i in range(4) for j in range(i + 1, 4)]
    for name, ((trial, algorithm, dataset, hparams_seed), test_envs) in enumerate(islice(product(places, envs), count)):
        args = {"algorithm": algorithm, "dataset": dataset, "trial_seed": trial, "hparams_seed": hparams_seed}
        args |= {"test_envs": test_envs, "data_dir": "/data", "output_dir": f"{folder}/{name}", "steps": 5001}
        args |= {f"another_{i}": None for i in range(18)}
        hparams = {f"hparam_{i}": float(chance.random()) for i in range(20)}
        lines = []
        for step in range(STEPS):
            accs = {f"env{i}_{split}_acc": float(chance.random()) for i in range(4) for split in ("in", "out")}
            numbers = {"step": 300 * step, "epoch": 1.5 * step, "loss": float(chance.random()), "step_time": 0.2}
            record = numbers | accs | {"mem_gb": 1.0, "args": args, "hparams": hparams}
            lines.append(json.dumps(record | {"versions": {"python": "3.11.7", "torch": "2.9.1"}}, sort_keys=True))
        text = "\n".join(lines) + "\n"
        (folder / str(name)).mkdir()
        (folder / str(name) / "results.jsonl").write_text(text)
        size += len(text)
    return size


def run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, 1024 * usage.ru_maxrss


def main() -> None:
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        sweep(Path(few), 600)
        size = sweep(Path(many), 2400)
        small = statistics.median(run([*OURS, few])[1] for _ in range(3))
        ours, parse, peaks = [], [], []
        for _ in range(ROUNDS):
            seconds, peak = run([*OURS, many])
            ours.append(seconds)
            peaks.append(peak)
            parse.append(run([sys.executable, "-c", PARSE, "-", many])[0])
    ratios = np.divide(ours, parse)
    print(f"2,400 runs x {STEPS} records, {size / 1e6:.0f} MB")
    print(
        f"collect_results: {statistics.median(ours):.2f} s; pandas and orjson alone: {statistics.median(parse):.2f} s"
    )
    print(f"ratio {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    grown = (statistics.median(peaks) - small) / (1800 * STEPS)
    print(f"memory: {statistics.median(peaks) / 2**20:.0f} MiB, {grown:.0f} bytes a record")


if __name__ == "__main__":
    main()
