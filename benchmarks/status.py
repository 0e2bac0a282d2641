"""How long `sweep status` takes, the whole process: `python benchmarks/status.py`.

1,000 jobs in all states and 10,000 jobs that are done, in a temporary folder (TMPDIR says where), each three times.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

from domainbed_hp import run_dir
from domainbed_hp.run_dir import State
from domainbed_hp.sweep.jobs import Job, save
from domainbed_hp.sweep.spec import SweepSpec, described, make_jobs

COMMAND = [sys.executable, "-X", "importtime", "-m", "domainbed_hp.scripts.sweep", "status", "--output_dir"]
FILES = {
    State.DONE: (run_dir.DONE, "done"),
    State.RUNNING: (run_dir.LOCK, "filelock/2\npid=12\nhost=node7\nmode=lease\ntoken=a\nduration=60.0\n"),
    State.FAILED: (run_dir.ERROR, "Traceback (most recent call last):\n" * 40 + "RuntimeError: the reason\n"),
    State.INCOMPLETE: (run_dir.OUT, "Environment:\n"),
}


def sweep(output_dir: Path, count: int, states: list[State]) -> list[Job]:
    """A sweep on disk whose jobs are in `states`, in turn."""
    values = {"output_dir": str(output_dir), "datasets": ["PACS", "VLCS"], "rows": [{"algorithm": "ERM"}]}
    spec = SweepSpec.of({**values, "n_trials": -(-count // 400)}, "benchmark")
    jobs = make_jobs(spec, spec.rows)[:count]
    for job, state in zip(jobs, cycle(states), strict=False):
        if state in FILES:
            job.folder.mkdir(parents=True)
            name, text = FILES[state]
            (job.folder / name).write_text(text)
    output_dir.mkdir(exist_ok=True)
    save(output_dir, described(spec, spec.rows), jobs, others=False)
    return jobs


def main() -> None:
    for count, states in ((1000, list(State)), (10_000, [State.DONE])):
        with tempfile.TemporaryDirectory() as folder:
            sweep(Path(folder), count, states)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                result = subprocess.run([*COMMAND, folder], capture_output=True, text=True, check=True)
                times.append(time.perf_counter() - start)
        loaded = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
        assert not {"torch", "pandas"} & loaded
        summary = next(line for line in result.stdout.splitlines() if " jobs: " in line)
        print(f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f}): {summary}")


if __name__ == "__main__":
    main()
