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
import uuid
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

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
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if (folder / ERROR).stat().st_size:  # DomainBed leaves an empty one in every folder
            return State.FAILED
    return State.INCOMPLETE


def failure(folder: Path) -> str:
    """The last line of the error of a failed run."""
    try:
        lines = (folder / ERROR).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "no error was written"


def alive(folder: Path) -> bool:
    """Whether a process works in `folder`: on this machine by its lock, on another by its heartbeat."""
    heartbeat = folder / HEARTBEAT
    with contextlib.suppress(OSError):  # who may not look at the lock tells by the heartbeat, too
        if owner_of(heartbeat).get("machine") == machine():
            return locked(folder)
    return not silent(heartbeat)


def owner_of(heartbeat: Path) -> dict[str, Any]:
    """Whom it names; nobody where it is not there or cannot be read, because it is just being written, say."""
    try:
        owner: dict[str, Any] = json.loads(heartbeat.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner


def silent(heartbeat: Path) -> bool:
    """Whether there was no sign for too long, or never one."""
    try:
        return time.time() - heartbeat.stat().st_mtime >= DEAD_S
    except OSError:
        return True


def locked(folder: Path) -> bool:
    """Whether a process of this machine holds the lock. The look is shared, so that two that look see no third."""
    try:
        import fcntl
    except ImportError:  # Windows
        return locked_by_trying(folder)
    with open(folder / LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some file systems say the latter
            return True
        except OSError:  # there are no locks here but filelock's own kind
            return locked_by_trying(folder)
    return False


def locked_by_trying(folder: Path) -> bool:
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

    def take(self) -> None:
        """Leave a heartbeat, a whole block, so that an error has room on a full disk. `Taken` where there is one.

        Where locks do not reach, it alone decides: of several that create it, one succeeds.
        """
        bury(self.folder)
        heartbeat = self.folder / HEARTBEAT
        try:
            file = open(heartbeat, "x")  # noqa: SIM115
        except FileExistsError:
            raise taken(self.folder) from None
        try:
            with file:
                file.write(json.dumps(self.owner).ljust(BLOCK))
        except OSError:
            heartbeat.unlink()
            self.release()
            raise
        self.thread.start()

    def beat(self) -> None:
        while not self.stopped.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.mine():
                    os.utime(self.folder / HEARTBEAT)

    def check(self) -> None:
        """`Taken` where another machine took this run for dead, after a long sleep of this one."""
        if not self.mine():
            raise taken(self.folder)

    def mine(self) -> bool:
        return owner_of(self.folder / HEARTBEAT) == self.owner

    def fail(self, text: str) -> None:
        """Leave `text` in err.txt, unless the run is another's now; on a full disk its end, where the heartbeat was."""
        if not self.mine():
            return
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
        heartbeat = self.folder / HEARTBEAT
        if self.mine() or not heartbeat.exists():  # `fail` may have used it up
            heartbeat.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Windows keeps what is open
                (self.folder / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Work in `folder`, which is created, alone. `Taken` where it is done or another process works in it.

    An exception is left in err.txt, and the last one is forgotten. A folder that was new stays only if something was
    written there: whoever mistypes an argument leaves no trace.
    """
    created = not folder.exists()
    lock, mine = filelock.FileLock(folder / LOCK), Claim(folder)
    with contextlib.ExitStack() as stack:
        if created:
            stack.callback(remove_empty, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)  # whoever asks for the state holds it for an instant
            stack.callback(lock.release)
            mine.take()
        except filelock.Timeout:
            raise taken(folder) from None
        except OSError as error:
            raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from error
        stack.callback(mine.release)  # whoever was refused touches nothing: the lock file is another's
        if (folder / DONE).exists():
            raise Taken(f"{folder} already holds a run that is done: choose another --output_dir or remove it")
        (folder / ERROR).unlink(missing_ok=True)
        try:
            yield mine
        except Exception as error:
            if not created or {path.name for path in folder.iterdir()} - {LOCK, HEARTBEAT}:
                mine.fail(f"{error}\n" if isinstance(error, UsageError) else traceback.format_exc())
            raise


def remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def bury(folder: Path) -> None:
    """Remove the heartbeat of a dead run, by who holds this machine's lock; `Taken` where it lives.

    Where locks do not reach, several may do so. Only one moves it aside, and what it moved may be the heartbeat of who
    was faster: it is judged again and put back.
    """
    heartbeat = folder / HEARTBEAT
    aside = heartbeat.with_name(f"{HEARTBEAT}.{uuid.uuid4().hex}")
    if elsewhere(heartbeat):
        raise taken(folder)
    try:
        os.rename(heartbeat, aside)
    except FileNotFoundError:  # there was none, or another was faster
        return
    if elsewhere(aside):
        os.replace(aside, heartbeat)  # whoever came in between learns it by `check`
        raise taken(folder)
    aside.unlink()


def elsewhere(heartbeat: Path) -> bool:
    """Whether it is a living one, of another machine or of nobody yet; this machine's lock is ours."""
    return owner_of(heartbeat).get("machine") != machine() and not silent(heartbeat)


def taken(folder: Path) -> Taken:
    owner = owner_of(folder / HEARTBEAT)
    who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"
    return Taken(f"{who} works in {folder}; it counts as dead {DEAD_S:.0f} s after its last sign")
