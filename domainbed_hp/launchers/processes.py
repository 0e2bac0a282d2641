"""What launchers share: a job's process, the log of its stderr, and the loop that keeps slots busy.

A job is an argv list that names its folder by `--output_dir`. Its exit code tells how it ended: 0 done, `EXIT_TAKEN`
nothing to do or somebody else at it, 128 + n stopped by signal n with its state saved, -n killed by signal n.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from domainbed_hp import run_dir
from domainbed_hp.files import cpu_count
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, State

LOG = "launch.log"
POLL_S = 0.05
GRACE_S = 60.0
"""Time that jobs have to save their state when their launcher is interrupted."""


def folder_of(command: Sequence[str]) -> Path:
    """The job's folder, the value of `--output_dir`."""
    if "--output_dir" not in command[:-1]:
        raise UsageError(f"a job's command names its folder by --output_dir; got {' '.join(command)}")
    return Path(command[command.index("--output_dir") + 1])


def taken(command: Sequence[str]) -> bool:
    """Whether the job needs nobody any more: it is done, or somebody works on it."""
    return run_dir.state(folder_of(command)) in (State.DONE, State.RUNNING)


def signal_of(code: int) -> str:
    """Name of the signal that ended a job with this exit code, by its own hand or the system's; "" for none."""
    number = code - 128 if code > 128 else -code
    return signal.Signals(number).name if number in signal.valid_signals() else ""


def stopped(code: int) -> bool:
    """Whether a job with this exit code was asked to stop; it goes on from where it was, if it had begun."""
    return signal_of(code) in ("SIGINT", "SIGTERM", "SIGUSR1")


def at_least_one(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}: got {value}, expected at least 1")


def environment(parallel: int, **more: str) -> dict[str, str]:
    """Of one of `parallel` jobs, which share the cores unless the user says how many threads each has."""
    return {"OMP_NUM_THREADS": str(max(1, cpu_count() // parallel)), **os.environ, **more}


class Unwritable(UsageError):
    """A job's folder."""


class Log:
    """`launch.log` in a job's folder, which is created: what one launch after the other writes to stderr.

    What `train` says before it opens its own files, an import error say, is nowhere else. It is appended to, because
    the job may have become another launcher's in the meantime.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.path = folder_of(command) / LOG
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab+")  # noqa: SIM115
        except OSError as error:
            raise Unwritable(f"{self.path.parent}: cannot be written to: {error.strerror}") from error
        self.start = self.file.tell()

    def close(self, code: int) -> list[str]:
        """What was written since it was opened; a log with nothing in it is removed."""
        with self.file:  # by its handle: another launcher may have removed it meanwhile
            self.file.seek(0)
            text = self.file.read()
        if not text and code != EXIT_TAKEN:
            self.path.unlink(missing_ok=True)
        return text[self.start :].decode(errors="replace").strip().splitlines()


class Slot:
    """Room for one job at a time, each in a process of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.log: Log

    def start(self, command: Sequence[str]) -> None:
        self.log = Log(command)
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log.file,
            process_group=0,  # Ctrl-C reaches the launcher alone, so that a job gets one signal, not two
        )

    def poll(self) -> int | None:
        """The exit code of the job, None while it runs."""
        assert self.process is not None
        return self.process.poll()


def run_all(commands: Sequence[Sequence[str]], slots: Sequence[Slot]) -> list[int]:
    """Run every command in the first slot that is free; the exit codes in the order of the commands.

    A job that is taken when its turn comes is not started. A failed one, also one whose folder cannot be written to, is
    reported on stderr and the others go on. An interrupt stops those that run.
    """
    codes = [EXIT_TAKEN] * len(commands)
    waiting, free = deque(enumerate(commands)), deque(slots)
    running: dict[int, Slot] = {}
    bar = tqdm(total=len(commands), unit="job", disable=None)  # None: no bar where stderr is not a terminal
    try:
        while waiting or running:
            while waiting and free:
                index, command = waiting.popleft()
                if taken(command):
                    bar.update()
                    continue
                running[index] = free.popleft()
                try:
                    running[index].start(command)
                except Unwritable as error:
                    codes[index] = 1
                    tqdm.write(str(error), file=sys.stderr)
                    free.append(running.pop(index))
                    bar.update()
            for index, slot in list(running.items()):
                code = slot.poll()
                if code is None:
                    continue
                codes[index] = code
                report(commands[index], code, slot.log.close(code))
                free.append(running.pop(index))
                bar.update()
            time.sleep(POLL_S if running else 0)
    finally:
        bar.close()
        end([slot.process for slot in running.values() if slot.process])
    return codes


def report(command: Sequence[str], code: int, lines: Sequence[str]) -> None:
    """Say on stderr how a job failed: folder, exit code, and the last line of its error or of what it wrote."""
    folder = folder_of(command)
    if code in (0, EXIT_TAKEN):
        return
    if stopped(code):
        how = f"stopped by {signal_of(code)}, goes on when it is launched again"
    else:
        how = f"killed by {signal_of(code)}" if code < 0 else f"failed with exit code {code}"
    last = lines[-1] if lines else "it wrote nothing to stderr"
    if run_dir.state(folder) is State.FAILED:
        last = run_dir.failure(folder)
    more = f" (all of it: {folder / LOG})" if len(lines) > 1 else ""
    tqdm.write(f"{how}: {folder}" + ("" if stopped(code) else f"\n    {last}{more}"), file=sys.stderr)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask jobs to stop, wait for them, and kill those that run after `GRACE_S` or a second interrupt."""
    if not processes:
        return
    deadline = time.monotonic() + GRACE_S
    try:
        for process in processes:
            process.terminate()
        print(f"Waiting for {len(processes)} jobs to save their state; another interrupt kills them.", file=sys.stderr)
        for process in processes:
            process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
