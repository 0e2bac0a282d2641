"""The parts that launchers share: the process of a job, the log of its stderr, and the loop that starts all jobs.

A job is a command line that names the folder of its run by `--output_dir`. Its exit code is 0 if the run is done,
`EXIT_TAKEN` if it was done before or another process works on it, 128 + n if signal n stopped it and its state is
saved, and -n if signal n killed it.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from domainbed_hp import run_dir
from domainbed_hp.files import cpu_count
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, LAUNCH_LOG, State

POLL_S = 0.05
"""Seconds between two looks at the processes."""
GRACE_S = 60.0
"""Seconds that jobs have to save their state when their launcher is interrupted."""


def get_folder(command: Sequence[str]) -> Path:
    """Return the folder of a job's run: the value of `--output_dir`."""
    if "--output_dir" not in command[:-1]:
        raise UsageError(f"got the command {' '.join(command)}, expected one with --output_dir FOLDER")
    return Path(command[command.index("--output_dir") + 1])


def check_at_least_one(**options: int | None) -> None:
    """Raise `UsageError` for an option of a launcher that is less than 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}: got {value}, expected at least 1")


def make_environment(parallel: int, **variables: str) -> dict[str, str]:
    """Return the environment variables of one of `parallel` jobs; OMP_NUM_THREADS = cores // parallel unless set."""
    return {"OMP_NUM_THREADS": str(max(1, cpu_count() // parallel)), **os.environ, **variables}


def get_signal_name(code: int) -> str:
    """Return the name of the signal that stopped or killed a job with this exit code, "" for other codes."""
    number = code - 128 if code > 128 else -code
    return signal.Signals(number).name if number in signal.valid_signals() else ""


def was_stopped(code: int) -> bool:
    """Return whether a job with this exit code was stopped by a signal. It resumes when it is launched again."""
    return get_signal_name(code) in ("SIGINT", "SIGTERM", "SIGUSR1")


class FolderNotWritable(UsageError):
    """The folder of a job cannot be created or written to."""


class LaunchLog:
    """`launch.log` in the folder of a job: the stderr of its processes, such as errors of imports."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LAUNCH_LOG
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab+")  # noqa: SIM115
        except OSError as error:
            raise FolderNotWritable(f"{folder}: cannot be written to: {error.strerror}") from error
        self.start = self.file.tell()

    def close(self, code: int) -> list[str]:
        """Return the lines that this launch wrote, and remove an empty log. `code` is the job's exit code."""
        with self.file:  # read by its handle: another launcher may have removed the file
            self.file.seek(0)
            text = self.file.read()
        if not text and code != EXIT_TAKEN:  # the log of a taken job may be another launcher's
            self.path.unlink(missing_ok=True)
        return text[self.start :].decode(errors="replace").strip().splitlines()


class Slot:
    """A place for one job at a time, with the environment variables of its process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.log: LaunchLog
        self.process: subprocess.Popen[bytes]

    def start(self, command: Sequence[str]) -> None:
        self.log = LaunchLog(get_folder(command))
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log.file,
            process_group=0,  # Ctrl-C reaches the launcher alone, so that a job gets one signal, not two
        )


def choose_jobs(commands: Sequence[Sequence[str]]) -> Iterator[tuple[int, bool]]:
    """Yield the index of every job, and whether to start it: False for a job that is done or running at that moment.

    Jobs that seem to run on another host come last: they are watched for a minute, and started if the host died.
    """
    remote: dict[Path, int] = {}
    for index, command in enumerate(commands):
        folder = get_folder(command)
        state = run_dir.read_state(folder)
        if state is State.RUNNING and not run_dir.is_local(folder):
            remote[folder] = index
        else:
            yield index, state not in (State.DONE, State.RUNNING)
    abandoned = run_dir.find_abandoned(list(remote))
    yield from ((index, folder in abandoned) for folder, index in remote.items())


def run_all(commands: Sequence[Sequence[str]], slots: Sequence[Slot]) -> list[int]:
    """Run every command in the first free slot, and return the exit codes in the order of the commands.

    A job that is not started has the code `EXIT_TAKEN`. A failure is reported on stderr and does not stop the others.
    An interrupt stops the jobs that run.
    """
    codes = [EXIT_TAKEN] * len(commands)
    waiting, free = choose_jobs(commands), deque(slots)
    running: dict[int, Slot] = {}
    bar = tqdm(total=len(commands), unit="job", disable=None)  # None: no bar where stderr is not a terminal
    try:
        while True:
            while free and (job := next(waiting, None)):
                index, start = job
                try:
                    if start:
                        free[0].start(commands[index])
                        running[index] = free.popleft()
                        continue
                except FolderNotWritable as error:
                    codes[index] = 1
                    tqdm.write(str(error), file=sys.stderr)
                bar.update()
            if not running:
                return codes
            time.sleep(POLL_S)
            for index, slot in list(running.items()):
                code = slot.process.poll()
                if code is None:
                    continue
                codes[index] = code
                report_failure(commands[index], code, slot.log.close(code))
                free.append(running.pop(index))
                bar.update()
    finally:
        bar.close()
        stop_processes([slot.process for slot in running.values()])


def report_failure(command: Sequence[str], code: int, lines: Sequence[str]) -> None:
    """Print to stderr how a job ended, unless it is done or taken: exit code, folder and the last line of its error.

    `lines` are the job's stderr; the last one is printed if the run left no `err.txt`.
    """
    if code in (0, EXIT_TAKEN):
        return
    folder = get_folder(command)
    if was_stopped(code):
        tqdm.write(f"stopped by {get_signal_name(code)}, goes on when it is launched again: {folder}", file=sys.stderr)
        return
    how = f"killed by {get_signal_name(code)}" if code < 0 else f"failed with exit code {code}"
    reason = lines[-1] if lines else "it wrote nothing to stderr"
    if run_dir.read_state(folder) is State.FAILED:
        reason = run_dir.read_failure(folder)
    more = f" (all of it: {folder / LAUNCH_LOG})" if len(lines) > 1 else ""
    tqdm.write(f"{how}: {folder}\n    {reason}{more}", file=sys.stderr)


def stop_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, and kill those that run after `GRACE_S` seconds or a second interrupt."""
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
