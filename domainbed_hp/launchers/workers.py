"""Several jobs in one process, one after another: the launcher's side of `scripts/worker.py`."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from domainbed_hp.launchers.processes import Log, Slot, stopped
from domainbed_hp.registry import UsageError

WORKER_MODULE = "domainbed_hp.scripts.worker"
EXIT_S = 10.0
"""Time that a worker which has answered has to leave."""


class WorkerSlot(Slot):
    """Room for one job at a time; a worker runs up to `jobs` of them. One that dies takes its job alone with it.

    A job goes to the worker as a line of JSON and comes back as a line with its exit code.
    """

    def __init__(self, environment: Mapping[str, str], jobs: int) -> None:
        super().__init__(environment)
        self.jobs, self.left = jobs, 0
        self.codes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.listener: threading.Thread

    def start(self, command: Sequence[str]) -> None:
        python, *module, name = command[:3]
        if [python, *module] != [sys.executable, "-m"]:
            raise UsageError(f"jobs_per_process needs commands `{sys.executable} -m MODULE ...`; got {command[:3]}")
        self.log = Log(command)
        if self.left == 0 or self.process is None or self.process.poll() is not None:
            self.replace()
        assert self.process is not None and self.process.stdin is not None
        job = {"module": name, "argv": command[3:], "log": str(self.log.path.absolute())}
        with contextlib.suppress(BrokenPipeError):  # it died: `poll` tells
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        self.left -= 1

    def poll(self) -> int | None:
        assert self.process is not None
        gone = self.process.poll()
        if gone is not None:
            self.listener.join(timeout=1)  # its answer may be on the way
        try:
            code: int | None = self.codes.get_nowait()
        except queue.Empty:
            code = gone
        if code is not None and (self.left == 0 or stopped(code)):  # a signal to stop is meant for the process
            self.close()
        return code

    def close(self) -> None:
        """The worker leaves when it has no job."""
        self.left = 0
        if self.process and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def replace(self) -> None:
        """A new worker in the place of the old one, which has nothing to do any more."""
        if self.process:
            self.close()
            try:
                self.process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process = self.spawn([sys.executable, "-m", WORKER_MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.codes, self.left = queue.SimpleQueue(), self.jobs
        self.listener = threading.Thread(target=listen, args=(self.process.stdout, self.codes), daemon=True)
        self.listener.start()


def listen(answers: IO[bytes], codes: "queue.SimpleQueue[int]") -> None:
    with answers:
        for line in answers:
            codes.put(int(line))
