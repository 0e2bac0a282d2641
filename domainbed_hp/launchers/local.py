"""Jobs as child processes on this machine, several at a time, the cores shared between them."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

LOG = "launch.log"


def claim_folder(command: Sequence[str]) -> Path | None:
    """Create the job's folder, the value of `--output_dir`: from now on it counts as launched. None without one."""
    if "--output_dir" not in command:
        return None
    folder = Path(command[command.index("--output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def launch(commands: list[list[str]], max_parallel: int | None = None) -> list[int]:
    """Run every command and return the exit codes, in the order of the commands (negative: killed by that signal).

    `max_parallel` defaults to one job per core. A child gets OMP_NUM_THREADS = cores // parallel unless it is set.
    A failed job is reported on stderr and the others go on. Its stderr stays in `launch.log` in its folder: what
    `train` says before it opens its own files, an import error say, is nowhere else. An interrupt ends the children.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parallel = max(1, min(max_parallel or cores, len(commands)))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // parallel)), **os.environ}

    codes = [0] * len(commands)
    waiting = list(enumerate(commands))[::-1]
    running: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    bar = tqdm(total=len(commands), unit="job", disable=None)  # None: no bar where stderr is not a terminal
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                index, command = waiting.pop()
                folder = claim_folder(command)
                log: IO[bytes] = open(folder / LOG, "w+b") if folder else tempfile.TemporaryFile()  # noqa: SIM115
                child = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
                )
                running[index] = child, log
            for index, (child, log) in list(running.items()):
                code = child.poll()
                if code is None:
                    continue
                codes[index] = code
                _finish(commands[index], code, log)
                del running[index]
                bar.update()
            time.sleep(0.05)
    finally:
        bar.close()
        _terminate([child for child, _ in running.values()])
    return codes


def _finish(command: Sequence[str], code: int, log: IO[bytes]) -> None:
    """Report a failed job: folder, exit code, last line of its stderr. A log with nothing in it is removed."""
    with log:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    folder = claim_folder(command)
    if folder and not lines:
        (folder / LOG).unlink(missing_ok=True)
    if code != 0:
        last = lines[-1] if lines else "it wrote nothing to stderr"
        more = f" (all of it: {folder / LOG})" if folder and len(lines) > 1 else ""
        tqdm.write(f"failed with exit code {code}: {folder or ' '.join(command)}\n    {last}{more}", file=sys.stderr)


def _terminate(children: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to all, ten seconds to obey, then SIGKILL."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
