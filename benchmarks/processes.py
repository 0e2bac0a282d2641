"""What jobs save that share a process: a sweep with a process for each job, and with one for all the jobs of a core.

    python benchmarks/processes.py [--rounds 3]

The quickstart, whose jobs train for most of their time, and the same jobs cut to a few steps. The two ways take turns,
as whole commands on all cores, with nothing else running; each round gives a ratio. Compares the records of both, which
must be equal but for times.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faults import outcome

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.toml"
SWEEPS = {"quickstart": [], "4 steps": ["--steps", "4", "--checkpoint_freq", "4", "--eval_images", "8"]}
WAYS = {"a process for each job": 1, "shared processes": 100}


def launch(folder: Path, jobs_per_process: int, more: Sequence[str]) -> float:
    """Seconds that the sweep takes."""
    command = [sys.executable, "-m", "domainbed_hp.scripts.sweep", "launch", "--config", str(QUICKSTART)]
    command += ["--output_dir", str(folder), "--jobs_per_process", str(jobs_per_process), "--skip_confirmation", *more]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name, more in SWEEPS.items():
        times = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                folders = [Path(folder) / str(count) for count in WAYS.values()]
                times.append([launch(to, count, more) for to, count in zip(folders, WAYS.values(), strict=True)])
                alone, shared = map(outcome, folders)
                assert alone == shared, "the records differ"
        ratio = np.divide(*np.transpose(times))
        medians = ", ".join(f"{way} {s:.1f} s" for way, s in zip(WAYS, np.median(times, axis=0), strict=True))
        print(f"{name}: {medians}, {np.median(ratio):.2f} times ({min(ratio):.2f} to {max(ratio):.2f})", flush=True)
    print("the records are equal but for times")


if __name__ == "__main__":
    main()
