"""The launcher `slurm`: jobs are entries of Slurm job arrays, submitted by submitit.

The nodes share the disk and the Python of the launcher. A job that runs out of time or is pre-empted saves its
state, is queued again and resumes. Jobs go on if their launcher ends; the next launcher waits for them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from domainbed_hp.launchers import processes
from domainbed_hp.launchers.processes import Slot, get_folder, report_failure, was_stopped
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, LAUNCH_LOG, State, read_state

DEFAULT_MINUTES = 240
"""Default of --slurm time. Slurm starts short jobs sooner, and a job that runs out of time is queued again."""
MIN_MINUTES = 5
"""Smallest --slurm time: jobs stop 90 s before the end."""
MAX_TIMEOUTS = 1000
"""Largest number of times that a job may run out of time; it resumes every time."""
MAX_ARRAY_SIZE = 1000
"""Largest number of jobs in an array; Slurm's default limit is 1001."""
IDS_FILE = "jobs.txt"
"""File in the folder `slurm` with a line for every submitted job: the name of its folder and its Slurm id."""
GONE = "GONE"
"""State of a job that Slurm does not list any more."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", GONE}
"""States of jobs that neither run nor are queued."""
POLL_S = 30.0
"""Longest time in seconds between two calls of squeue; in the first minutes of a launch it is shorter."""


def launch(
    commands: list[list[str]], slurm: Mapping[str, str] | None = None, max_parallel: int | None = None
) -> list[int]:
    """Submit every command, wait until all jobs have ended, and return the exit codes in the order of the commands.

    Args:
        slurm: options of sbatch by their long names: partition, time, mem, gpus_per_node, ...
        max_parallel: the largest number of jobs that run at a time.

    Slurm's own logs are in the folder `slurm` next to the folders of the jobs.
    """
    processes.check_at_least_one(max_parallel=max_parallel)
    options = parse_options(slurm or {})
    if not commands:
        return []
    logs = get_folder(commands[0]).absolute().parent / "slurm"
    codes = [EXIT_TAKEN] * len(commands)
    queued = find_queued(logs)
    names = [get_folder(command).name for command in commands]
    ids = {i: queued[name] for i, name in enumerate(names) if name in queued}
    rest = [i for i in range(len(commands)) if i not in ids]
    new = [rest[k] for k, start in processes.choose_jobs([commands[i] for i in rest]) if start]
    ids |= dict(zip(new, submit([commands[i] for i in new], logs, options, max_parallel), strict=True))
    try:
        for i, last_state in wait_for_jobs(ids, len(commands)):
            codes[i], lines = read_outcome(commands[i], logs, ids[i], last_state)
            report_failure(commands[i], codes[i], lines)
    except KeyboardInterrupt:
        arrays = " ".join(sorted({job.split("_")[0] for job in ids.values()}))
        print(f"Slurm's jobs go on; `sweep status` shows their states. To end them: scancel {arrays}", file=sys.stderr)
        raise
    return codes


class NodeJob:
    """The function that submitit calls on the node. It runs the command in another process."""

    process: subprocess.Popen[bytes] | None = None

    def __call__(self, command: list[str]) -> int:
        slot = Slot(processes.make_environment(1))
        # Slurm signals every process of a job. SIGUSR2 is for submitit in this process: a signal that is blocked while
        # the child starts stays blocked in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        slot.start(command)
        self.process = slot.process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        code = self.process.wait()
        slot.log.close(code)
        if was_stopped(code):
            requeue()
            sys.exit(code)  # without a result: the job is not over unless it was cancelled
        return code

    def checkpoint(self, command: list[str]) -> Any:
        """Return the job to queue again, once its state is saved. Submitit calls it in a signal handler."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # not `wait`: the interrupted call holds its lock
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(NodeJob(), command)


def requeue() -> None:
    """Queue this job again, unless Slurm is ending it: a job that runs and got a signal is being pre-empted."""
    from submitit import JobEnvironment

    job = JobEnvironment().job_id
    if read_states().get(job) == "RUNNING":
        subprocess.run(["scontrol", "requeue", job])


def parse_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return options as sbatch takes them, from the texts of `--slurm`; the time is in minutes."""
    options: dict[str, Any] = {name.replace("-", "_"): text for name, text in texts.items()}
    minutes = options.pop("timeout_min", None)
    options["time"] = parse_minutes(options.get("time", minutes) or str(DEFAULT_MINUTES))
    flags = {"": True, "true": True}
    options = {"requeue": True} | {name: flags.get(value, value) for name, value in options.items()}
    return {name: value for name, value in options.items() if value != "false"}


def parse_minutes(text: str) -> int:
    """Return the minutes of a time of Slurm: minutes, minutes:seconds, h:m:s, days-h, days-h:m or days-h:m:s."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UsageError(f"--slurm time={text}: expected minutes, hours:minutes:seconds or days-hours, as sbatch")
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:  # the first part is minutes
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    total = int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)
    if total < MIN_MINUTES:
        raise UsageError(f"--slurm time={text}: expected at least {MIN_MINUTES} minutes: jobs stop 90 s before the end")
    return total


def submit(
    commands: Sequence[list[str]], logs: Path, options: Mapping[str, Any], max_parallel: int | None
) -> list[str]:
    """Submit commands as job arrays, and return their Slurm ids."""
    if not commands:
        return []
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    chunks = [commands[i : i + MAX_ARRAY_SIZE] for i in range(0, len(commands), MAX_ARRAY_SIZE)]
    ids: list[str] = []
    try:
        executor = SlurmExecutor(logs, max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(
            job_name=logs.parent.name,
            time=options["time"],
            array_parallelism=max(1, max_parallel // len(chunks)) if max_parallel else MAX_ARRAY_SIZE,
            additional_parameters={name: value for name, value in options.items() if name != "time"},
        )
        for chunk in chunks:
            new = [job.job_id for job in executor.map_array(NodeJob(), chunk)]
            with open(logs / IDS_FILE, "a") as file:
                file.writelines(f"{get_folder(c).name} {job}\n" for c, job in zip(chunk, new, strict=True))
            ids += new
    except (FailedJobError, RuntimeError) as error:
        raise UsageError(f"Slurm refused the jobs: {error}. Correct sbatch's options: --slurm KEY=VALUE") from error
    return ids


def find_queued(logs: Path) -> dict[str, str]:
    """Return the jobs of earlier launchers that have not ended: name of the job's folder -> Slurm id."""
    now = read_states()
    lines = (logs / IDS_FILE).read_text().splitlines() if (logs / IDS_FILE).exists() else []
    ids = dict(line.split() for line in lines)
    return {name: job for name, job in ids.items() if now.get(job, GONE) not in ENDED}


def read_states() -> dict[str, str]:
    """Return the states of the user's jobs by Slurm id, from squeue: not every cluster has accounting (sacct)."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except FileNotFoundError as error:
        raise UsageError("the launcher slurm needs Slurm's commands (squeue, sbatch) on this machine") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"squeue failed: {error.stderr.strip()}. Try again when Slurm answers") from error
    return dict(line.split() for line in lines)


def wait_for_jobs(ids: Mapping[int, str], total: int) -> Iterator[tuple[int, str]]:
    """Yield the index and the last state of every job as it ends."""
    left, start = dict(ids), time.monotonic()
    with tqdm(total=total, initial=total - len(ids), unit="job", disable=None) as bar:
        while left:
            try:
                now = read_states()
            except UsageError as error:  # the jobs go on without this process
                tqdm.write(f"{error}; asking again", file=sys.stderr)
                now = dict.fromkeys(left.values(), "UNKNOWN")
            for i, job in list(left.items()):
                if now.get(job, GONE) in ENDED:
                    del left[i]
                    yield i, now.get(job, GONE)
                    bar.update()
            bar.set_postfix(Counter(now[job].lower() for job in left.values()))
            if left:
                time.sleep(min(POLL_S, 1 + (time.monotonic() - start) / 10))


def read_outcome(command: Sequence[str], logs: Path, job: str, last_state: str) -> tuple[int, list[str]]:
    """Return the exit code of an ended job and the reason in lines. A job without a result was cancelled or killed."""
    from submitit import SlurmJob

    result: SlurmJob[int] = SlurmJob(logs, job)
    log = get_folder(command) / LAUNCH_LOG
    if result.paths.result_pickle.exists():
        with contextlib.suppress(Exception):  # it was raised on the node, and is in Slurm's log
            return result.result(), log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if read_state(get_folder(command)) is State.DONE:
        return 0, []
    code = 128 + signal.SIGTERM if last_state == "CANCELLED" else 1
    return code, [f"Slurm says {last_state}; its logs: {result.paths.stderr.with_suffix('.*')}"]
