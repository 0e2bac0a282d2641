"""The folder of a run: the names of its files, its state, and the lock of the process that works in it.

A process that works in the folder holds `lock`, a lease of filelock: a file that names the process and its host, and
that the process touches every LEASE_S / 3 seconds. A process on the same host sees at once whether the holder is alive.
A process on another host watches the file: if it changes, the holder is alive; if it does not change for LEASE_S
seconds by the clock of the watcher, the lease is taken over. No clocks of two hosts are compared. A holder that was
suspended for so long loses its lease, so it calls `RunLock.check` before each write.

`read_state` does not watch, but believes a lease of another host whose file is at most RUNNING_S seconds old. A
launcher watches all such jobs together for LEASE_S seconds, and starts those whose lease did not change.
"""

import contextlib
import functools
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from domainbed_hp.registry import UsageError

RESULTS = "results.jsonl"  # records, one JSON object per line
CHECKPOINT = "checkpoint.pt"  # the state that a stopped run resumes from
MODEL = "model.safetensors"  # the model after the last step
BEST_MODEL = "model_best.safetensors"  # the model that training-domain validation selects, with --keep best
STEP_MODEL = "model_step{step}.safetensors"  # the model at a step, with --save_model_every_checkpoint
OUT = "out.txt"  # a copy of the run's stdout
ERROR = "err.txt"  # the exception that ended the run; DomainBed leaves an empty one in every folder
DONE = "done"  # the file that is written last
LOCK = "lock"  # the lease of the process that works in the folder
LAUNCH_LOG = "launch.log"  # the stderr of the job's process, written by its launcher
OLD_HEARTBEAT = "heartbeat.json"  # left by killed runs of an earlier version, and removed

LEASE_S = 60.0
"""Seconds without a change after which the lease of another host is taken over."""
POLL_S = 0.2
"""Seconds between two looks at a lease that is watched."""
RUNNING_S = 600.0
"""Largest age in seconds of the lease's file of a running run; clocks of hosts differ by less."""
EXIT_TAKEN = 75
"""Exit code of `train` if the run is done or another process works on it: BSD's EX_TEMPFAIL."""


class State(StrEnum):
    """The state of a run, in DomainBed's words where DomainBed has the state."""

    NOT_LAUNCHED = "Not launched"
    RUNNING = "Running"
    INCOMPLETE = "Incomplete"
    FAILED = "Failed"
    DONE = "Done"


class RunTaken(UsageError):
    """The run is done, or another process works on it."""


def read_state(folder: Path) -> State:
    """Return the state of the run in `folder`, at the cost of a few calls of `stat`."""
    if (folder / DONE).exists():
        return State.DONE
    if not folder.exists():
        return State.NOT_LAUNCHED
    if read_holder(folder):
        return State.RUNNING
    with contextlib.suppress(OSError):
        if (folder / ERROR).stat().st_size:
            return State.FAILED
    return State.INCOMPLETE


def read_failure(folder: Path) -> str:
    """Return the last line of the error of a failed run."""
    try:
        lines = (folder / ERROR).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "no error was written"


def read_holder(folder: Path) -> OwnerRecord | None:
    """Return the owner of the lease on `folder`; None without a lease, or if its process seems to be dead."""
    try:
        age_s = time.time() - (folder / LOCK).stat().st_mtime
    except OSError:
        return None
    owner = make_lease(folder).owner if age_s <= RUNNING_S else None
    return owner if owner and (owner.hostname != get_host_name() or is_alive(owner.pid)) else None


def is_local(folder: Path) -> bool:
    """Return whether a process of this host works in `folder`."""
    owner = read_holder(folder)
    return owner is not None and owner.hostname == get_host_name()


@functools.cache
def get_host_name() -> str:
    """Return the name of this host as filelock writes it, which is different in every container."""
    try:
        with tempfile.TemporaryDirectory() as folder, make_lease(Path(folder)) as lease:
            owner = lease.owner
    except OSError:
        owner = None
    return owner.hostname if owner else socket.gethostname()


def is_alive(pid: int) -> bool:
    """Return whether a process of this host exists."""
    if os.name == "nt":  # `os.kill` would signal it; the age of the lease alone decides
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # others: it is another user's
    return True


def make_lease(folder: Path) -> SoftFileLease:
    """Return the lease on `folder`, not acquired. All threads of a process share it."""
    return SoftFileLease(folder / LOCK, lease_duration=LEASE_S, thread_local=False)


def read_stamp(folder: Path) -> tuple[int, int] | None:
    """Return the time of change and the inode of the lease's file, which its holder changes; None without a file."""
    try:
        with open(folder / LOCK, "rb") as file:  # opened: network file systems cache what `stat` returns
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def find_abandoned(folders: Sequence[Path]) -> list[Path]:
    """Watch the leases on `folders` together, and return the folders whose lease did not change for LEASE_S seconds."""
    stamps = {folder: read_stamp(folder) for folder in folders}
    end = time.monotonic() + LEASE_S
    while stamps and time.monotonic() < end:
        time.sleep(LEASE_S / 30)
        stamps = {folder: stamp for folder, stamp in stamps.items() if read_stamp(folder) == stamp}
    return list(stamps)


class RunLock:
    """A context in which this process alone works in the folder of a run.

    A new folder is removed at the end if nothing was written there. The `err.txt` of an earlier attempt is removed, and
    an exception written to a new one: a `UsageError` as its message, others as a traceback.

    Raises:
        RunTaken: the run is done, or another process works on it. A lease of another host is watched first.
        UsageError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lease = make_lease(folder)
        self.created = False

    def __enter__(self) -> Self:
        self.created = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if (self.folder / DONE).exists():
                hint = "choose another --output_dir or remove the folder"
                raise RunTaken(f"{self.folder} already holds a run that is done: {hint}")
            for name in (ERROR, OLD_HEARTBEAT):
                (self.folder / name).unlink(missing_ok=True)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise UsageError(f"{self.folder}: cannot be written to: {error.strerror}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, RunTaken):
                self.check()  # the folder may be another process's, and the error a consequence
                if not self.created or {path.name for path in self.folder.iterdir()} != {LOCK}:
                    self._write_error(f"{error}\n" if isinstance(error, UsageError) else traceback.format_exc())
        finally:
            self._release()

    def check(self) -> None:
        """Raise `RunTaken` if the lease is lost: it was taken over, or its file was deleted."""
        owner = self.lease.owner
        if owner and owner.token != self.lease.token:
            raise self._make_error()
        if owner is None or self.lease.compromise:
            lost = f"{self.folder / LOCK} was removed, or could not be touched for too long"
            raise RunTaken(f"{lost}: another process may work in the folder, so this one stops")

    def _acquire(self) -> None:
        lock = self.folder / LOCK
        with contextlib.suppress(FileNotFoundError):
            if not lock.stat().st_size:
                # filelock never takes over an empty file, which a crash of the host may leave. With one byte it is
                # malformed, and is taken over after 2 s. A process that is about to write its lease overwrites it.
                with open(lock, "ab") as file:
                    file.write(b"\n")
        first = read_stamp(self.folder)

        def is_holder_alive() -> bool:
            return is_local(self.folder) or read_stamp(self.folder) not in (None, first)

        try:
            self.lease.acquire(timeout=LEASE_S + 10, poll_interval=POLL_S, cancel_check=is_holder_alive)
        except (Timeout, LeaseSettingsMismatch):
            raise self._make_error() from None

    def _release(self) -> None:
        self.lease.release()
        if self.created:
            with contextlib.suppress(OSError):  # it is not empty
                self.folder.rmdir()

    def _write_error(self, text: str) -> None:
        try:
            (self.folder / ERROR).write_text(text)
        except OSError:  # the disk is full: the block of the lease's file has room for the end of the text
            self.lease.release()
            with contextlib.suppress(OSError):
                (self.folder / ERROR).write_text(text[-1000:])

    def _make_error(self) -> RunTaken:
        owner = self.lease.owner
        who = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
        return RunTaken(f"{who} works in {self.folder}: wait until it ends, or choose another --output_dir")
