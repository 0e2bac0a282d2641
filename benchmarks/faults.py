"""Records of a sweep whose processes are killed again and again, compared with those of an undisturbed one.

    python benchmarks/faults.py [--kills 50] [--seed 0]

How: six jobs on ShapesDG run undisturbed, then again while at random moments `kill -9` hits the launcher, a job, or
both, and the sweep is launched anew. Every results.jsonl must be equal but for times, and a job
that is done must never be touched again. Exits with 1 otherwise.

Runtime on two cores: 6 minutes with 50 kills.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from domainbed_hp.run_dir import DONE, State, read_state
from domainbed_hp.sweep.jobs import load_jobs

LAUNCH = [
    *("-m", "domainbed_hp.scripts.sweep", "launch", "--skip_confirmation", "--datasets", "ShapesDG"),
    *("--algorithms", "LoRA", "HeadPurification", "FineTuneCLIP", "--test_envs", "1"),
    *("--n_trials", "2", "--n_hparams", "1"),
    *("--steps", "200", "--checkpoint_freq", "4", "--eval_images", "8", "--skip_model_save"),
    *("--hparams", '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'),
]


def start_launcher(folder: Path) -> subprocess.Popen[bytes]:
    """Start a launcher in a process group of its own."""
    command = [sys.executable, *LAUNCH, "--output_dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def find_children(pid: int) -> list[int]:
    """Return the processes that `pid` started, from /proc."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                pids.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return pids


def read_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every job, without what differs between two runs of the same job."""
    result = {}
    for job in load_jobs(folder):
        lines = (job.folder / "results.jsonl").read_text().splitlines()
        result[job.folder.name] = records = [json.loads(line) for line in lines]
        for record in records:
            del record["step_time"], record["elapsed_s"], record["args"]["output_dir"]
    return result


def done_times(folder: Path) -> dict[str, int]:
    """Return the time at which a job was done, for every job that is."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"*/{DONE}")}


def disturb(folder: Path, kills: int, chance: random.Random, count: int) -> Counter[str]:
    """Launch a sweep of `count` jobs, kill until `kills` have hit, launch to the end. Return the hits by kind."""
    hits: Counter[str] = Counter()
    done: dict[str, int] = {}
    launcher = start_launcher(folder)
    while sum(hits.values()) < kills:
        time.sleep(chance.uniform(0.2, 6))
        victims = {"launcher": [launcher.pid], "job": find_children(launcher.pid)}
        victims["both"] = victims["launcher"] + victims["job"]
        kind = chance.choice(sorted(kind for kind in victims if victims[kind]))
        if launcher.poll() is None and victims[kind]:
            hits[kind] += 1
            for pid in victims[kind]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        now = done_times(folder)
        assert all(now[name] == when for name, when in done.items()), "a job was done twice"
        done = now
        print(f"{sum(hits.values())} kills, {len(done)} jobs done", flush=True)
        if len(done) == count:
            break
        if launcher.poll() is not None or kind != "job":
            launcher.wait()
            launcher = start_launcher(folder)
    launcher.wait()
    while start_launcher(folder).wait() or any(read_state(job.folder) != State.DONE for job in load_jobs(folder)):
        time.sleep(1)
    assert all(done_times(folder)[name] == when for name, when in done.items()), "a job was done twice"
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and victims")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder) / "whole", Path(folder) / "torn"
        begin = time.time()
        assert start_launcher(whole).wait() == 0
        undisturbed_s, begin = time.time() - begin, time.time()
        hits = disturb(torn, args.kills, random.Random(args.seed), len(load_jobs(whole)))
        expected, got = read_records(whole), read_records(torn)
        print(f"undisturbed: {undisturbed_s:.0f} s; with {dict(hits)} kills: {time.time() - begin:.0f} s")
        equal = sum(expected[name] == got.get(name) for name in expected)
        print(f"{equal} of {len(expected)} results.jsonl are equal but for times")
        if equal < len(expected) or expected.keys() != got.keys():
            raise SystemExit(1)


if __name__ == "__main__":
    main()
