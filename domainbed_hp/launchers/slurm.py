"""Jobs of a Slurm cluster, as arrays, through submitit; nodes share the disk and the Python of the launcher.

A job that runs out of time or is pre-empted saves its state, queues again and goes on. Jobs need no launcher: one that
is gone leaves them to Slurm. The next one submits none of them twice: it waits for those of its jobs that still queue,
and `status` tells of those that run.
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

from domainbed_hp import run_dir
from domainbed_hp.launchers.processes import LOG, Slot, at_least_one, environment, folder_of, report, stopped, taken
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, State

MINUTES = 240
"""Time of a job before it queues again, unless the user says otherwise: short ones are let in sooner."""
LEAST = 5
TIMES = 1000
"""A job may run out of time so often; it goes on where it was, so that is no failure."""
ARRAY = 1000
"""Jobs of an array; Slurm's own limit is 1001 unless it is configured."""
IDS = "jobs.txt"
"""Name of a job's folder and its Slurm id, a line for each that was submitted."""
GONE = "GONE"
"""State of a job that Slurm has forgotten."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", GONE}
POLL_S = 30.0
"""Seconds between two questions to Slurm, at most; a sweep that began just now is asked about more often."""


def launch(
    commands: list[list[str]], slurm: Mapping[str, str] | None = None, max_parallel: int | None = None
) -> list[int]:
    """Submit every command, wait until all have left the queue, and return the exit codes in their order.

    `slurm` holds options of sbatch by their long names: partition, time, mem, gpus_per_node, ... Logs of Slurm are in
    the folder `slurm` beside the jobs' folders.
    """
    at_least_one(max_parallel=max_parallel)
    options = sbatch_options(slurm or {})
    if not commands:
        return []
    logs = folder_of(commands[0]).absolute().parent / "slurm"
    codes = [EXIT_TAKEN] * len(commands)
    queued = in_queue(logs)
    ids = {i: queued[name] for i, name in enumerate(folder_of(c).name for c in commands) if name in queued}
    new = [i for i, command in enumerate(commands) if i not in ids and not taken(command)]
    ids |= dict(zip(new, submit([commands[i] for i in new], logs, options, max_parallel), strict=True))
    try:
        for i, last_state in ended(ids, len(commands)):
            codes[i], lines = outcome(commands[i], logs, ids[i], last_state)
            report(commands[i], codes[i], lines)
    except KeyboardInterrupt:
        arrays = " ".join(sorted({job.split("_")[0] for job in ids.values()}))
        print(f"Slurm's jobs go on; `status` tells how far they are. To end them: scancel {arrays}", file=sys.stderr)
        raise
    return codes


class Run:
    """A job on its node, as submitit calls it: the command in a process of its own."""

    process: subprocess.Popen[bytes] | None = None

    def __call__(self, command: list[str]) -> int:
        slot = Slot(environment(1))
        # Slurm signals every process of a job. This one is between it and submitit, and a signal that is blocked here
        # stays so in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        slot.start(command)
        self.process = slot.process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        assert self.process is not None
        code = self.process.wait()
        slot.log.close(code)
        if stopped(code):
            requeue()
            sys.exit(code)  # without a result: the job is not over, unless somebody cancelled it
        return code

    def checkpoint(self, command: list[str]) -> Any:
        """What to queue again, when the job has saved its state. Submitit calls it in a signal handler."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # `wait` would wait for the one that was interrupted
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Run(), command)


def requeue() -> None:
    """Queue this job again where Slurm does not end it: whoever got a signal all the same is about to be pre-empted."""
    from submitit import JobEnvironment

    job = JobEnvironment().job_id
    if states().get(job) == "RUNNING":
        subprocess.run(["scontrol", "requeue", job])


def sbatch_options(given: Mapping[str, str]) -> dict[str, Any]:
    """`given` as sbatch takes it; the time in minutes."""
    options: dict[str, Any] = {name.replace("-", "_"): value for name, value in given.items()}
    minutes = options.pop("timeout_min", None)
    options["time"] = minutes_of(options.get("time", minutes) or str(MINUTES))
    flags = {"": True, "true": True}
    return {"requeue": True} | {name: flags.get(value, value) for name, value in options.items() if value != "false"}


def minutes_of(text: str) -> int:
    """A time as Slurm writes it: minutes, minutes:seconds, h:m:s, days-h, days-h:m or days-h:m:s."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UsageError(f"--slurm time={text}: expected minutes, hours:minutes:seconds or days-hours, as sbatch")
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:  # minutes first
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    total = int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)
    if total < LEAST:
        raise UsageError(f"--slurm time={text}: expected at least {LEAST} minutes: jobs stop 90 s before the end")
    return total


def submit(
    commands: Sequence[list[str]], logs: Path, options: Mapping[str, Any], max_parallel: int | None
) -> list[str]:
    """Slurm's ids of the commands, which are queued."""
    if not commands:
        return []
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    chunks = [commands[i : i + ARRAY] for i in range(0, len(commands), ARRAY)]
    ids: list[str] = []
    try:
        executor = SlurmExecutor(logs, max_num_timeout=TIMES)
        executor.update_parameters(
            job_name=logs.parent.name,
            time=options["time"],
            array_parallelism=max(1, max_parallel // len(chunks)) if max_parallel else ARRAY,
            additional_parameters={name: value for name, value in options.items() if name != "time"},
        )
        for chunk in chunks:
            new = [job.job_id for job in executor.map_array(Run(), chunk)]
            with open(logs / IDS, "a") as file:
                file.writelines(f"{folder_of(c).name} {job}\n" for c, job in zip(chunk, new, strict=True))
            ids += new
    except (FailedJobError, RuntimeError) as error:
        raise UsageError(f"Slurm took no jobs: {error}. Options of sbatch are given as --slurm key=value") from error
    return ids


def in_queue(logs: Path) -> dict[str, str]:
    """Name of a job's folder -> Slurm id, of those that an earlier launcher left in the queue."""
    now = states()
    lines = (logs / IDS).read_text().splitlines() if (logs / IDS).exists() else []
    ids = dict(line.split() for line in lines)
    return {name: job for name, job in ids.items() if now.get(job, GONE) not in ENDED}


def states() -> dict[str, str]:
    """Slurm id -> state, of the user's jobs. Asks the queue, which every cluster has; accounting is not everywhere."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except FileNotFoundError as error:
        raise UsageError("the launcher slurm needs Slurm's commands (squeue, sbatch) on this machine") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"Slurm does not answer: {error.stderr.strip()}") from error
    return dict(line.split() for line in lines)


def ended(ids: Mapping[int, str], total: int) -> Iterator[tuple[int, str]]:
    """Each job when it has ended, and its last state."""
    left, start = dict(ids), time.monotonic()
    with tqdm(total=total, initial=total - len(ids), unit="job", disable=None) as bar:
        while left:
            try:
                now = states()
            except UsageError as error:  # the jobs do not need us, nor we an answer at once
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


def outcome(command: Sequence[str], logs: Path, job: str, last_state: str) -> tuple[int, list[str]]:
    """Exit code of a job that has ended, and what it said. Without a result it was cancelled, or Slurm killed it."""
    from submitit import SlurmJob

    result: SlurmJob[int] = SlurmJob(logs, job)
    log = folder_of(command) / LOG
    if result.paths.result_pickle.exists():
        with contextlib.suppress(Exception):  # what was raised on the node; its log has it
            return result.result(), log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if run_dir.state(folder_of(command)) is State.DONE:
        return 0, []
    code = 128 + signal.SIGTERM if last_state == "CANCELLED" else 1
    return code, [f"Slurm says {last_state}; its logs: {result.paths.stderr.with_suffix('.*')}"]
