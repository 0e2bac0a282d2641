"""The folder of a run: who works in it and how it ended, told by its files alone, to any process on any machine.

`done` is written last. While a run works it holds `lock`, which the system frees when the process dies, however it
dies, and touches `heartbeat.json`, for machines between which locks do not reach. `err.txt` says why it failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import filelock

from domainbed_hp.registry import UsageError

DONE = "done"
ERROR = "err.txt"
LOCK = "lock"
HEARTBEAT = "heartbeat.json"
BEAT_S = 10.0
DEAD_S = 60.0
"""Silence after which a run of another machine counts as dead."""
BLOCK = 4096
EXIT_TAKEN = 75
"""Exit code of `train` where there is nothing to do: BSD's EX_TEMPFAIL."""


class State(StrEnum):
    """Of a run; the words that DomainBed has are DomainBed's."""

    NOT_LAUNCHED = "Not launched"
    RUNNING = "Running"
    INCOMPLETE = "Incomplete"
    FAILED = "Failed"
    DONE = "Done"


class Taken(UsageError):
    """The run is done, or somebody works on it."""


def state(folder: Path) -> State:
    """The state of the run in `folder`."""
    if (folder / DONE).exists():
        return State.DONE
    if not folder.exists():
        return State.NOT_LAUNCHED
    if alive(folder):
        return State.RUNNING
    # DomainBed leaves an empty one in every folder.
    return State.FAILED if (folder / ERROR).exists() and (folder / ERROR).stat().st_size else State.INCOMPLETE


def failure(folder: Path) -> str:
    """The last line of the error of a failed run."""
    try:
        lines = (folder / ERROR).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "no error was written"


def alive(folder: Path) -> bool:
    """Whether a process works in `folder`: on this machine by its lock, on another by its heartbeat."""
    try:
        owner = json.loads((folder / HEARTBEAT).read_bytes())
        age = time.time() - (folder / HEARTBEAT).stat().st_mtime
    except (OSError, ValueError):
        return False
    with contextlib.suppress(OSError):  # who may not write here tells by the heartbeat, too
        if owner.get("machine") == machine():
            return locked(folder)
    return age < DEAD_S


def locked(folder: Path) -> bool:
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def machine() -> str:
    """Tells machines apart: processes of one share its locks."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


class Claim:
    """The right to work in a folder; see `claim`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.owner = folder, {"machine": machine(), "host": socket.gethostname(), "pid": os.getpid()}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)

    def write(self) -> None:
        """`Taken` where another machine was faster. A whole block, so that an error has room on a full disk."""
        try:
            with open(self.folder / HEARTBEAT, "x") as file:
                file.write(json.dumps(self.owner).ljust(BLOCK))
        except FileExistsError:
            raise taken(self.folder) from None
        except OSError as error:
            (self.folder / HEARTBEAT).unlink(missing_ok=True)
            raise UsageError(f"{self.folder}: cannot be written to: {error.strerror}") from error
        self.thread.start()

    def beat(self) -> None:
        while not self.stopped.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.folder / HEARTBEAT)

    def check(self) -> None:
        """`Taken` where another machine took this run for dead, after a long sleep of this one."""
        if not self.mine():
            raise taken(self.folder)

    def mine(self) -> bool:
        try:
            return bool(json.loads((self.folder / HEARTBEAT).read_bytes()) == self.owner)
        except (OSError, ValueError):
            return False

    def fail(self, text: str) -> None:
        """Leave `text` in err.txt; on a full disk its end, in the room of the heartbeat."""
        try:
            (self.folder / ERROR).write_text(text)
        except OSError:
            with contextlib.suppress(OSError):
                with open(self.folder / HEARTBEAT, "r+") as file:
                    file.write(text[-BLOCK // 2 :].ljust(BLOCK))
                os.replace(self.folder / HEARTBEAT, self.folder / ERROR)

    def release(self) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        if self.mine():
            (self.folder / HEARTBEAT).unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Work in `folder`, which is created, alone. `Taken` where it is done or another process works in it.

    An exception is left in err.txt, and the last one is forgotten. A folder that was new stays only if something was
    written there: whoever mistypes an argument leaves no trace.
    """
    created = not folder.exists()
    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # whoever asks for the state holds it for an instant
    except filelock.Timeout:
        raise taken(folder) from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from error
    mine = Claim(folder)
    try:
        if (folder / DONE).exists():
            raise Taken(f"{folder} already holds a run that is done: choose another --output_dir or remove it")
        if (folder / HEARTBEAT).exists() and elsewhere(folder):
            raise taken(folder)
        (folder / HEARTBEAT).unlink(missing_ok=True)
        mine.write()
        (folder / ERROR).unlink(missing_ok=True)
        try:
            yield mine
        except Exception as error:
            if not created or {path.name for path in folder.iterdir()} - {LOCK, HEARTBEAT}:
                mine.fail(f"{error}\n" if isinstance(error, UsageError) else traceback.format_exc())
            raise
    finally:
        mine.release()
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def elsewhere(folder: Path) -> bool:
    """Whether the heartbeat is a living one of another machine; this machine's lock is ours."""
    try:
        owner = json.loads((folder / HEARTBEAT).read_bytes())
    except (OSError, ValueError):
        return False
    return owner.get("machine") != machine() and alive(folder)


def taken(folder: Path) -> Taken:
    try:
        owner = json.loads((folder / HEARTBEAT).read_bytes())
        who = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return Taken(f"{who} works in {folder}; it counts as dead {DEAD_S:.0f} s after its last sign")
