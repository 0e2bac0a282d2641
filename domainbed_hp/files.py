"""Atomic writes, hashes and locks of files, the cache folder, and the number of cores."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end its file replaces `path` in one step, and is synced to disk.

    On an error the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the pattern of `remove_temporary_files`
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def hold_lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path`; where another process holds it, print `message` to stderr and wait."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(message, file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        # Before the release: a waiting process notices that the file is gone, and locks a new one.
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()


def cache_dir() -> Path:
    """Return the folder for files that can be made again: $DOMAINBED_HP_CACHE, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("DOMAINBED_HP_CACHE") or pooch.os_cache("domainbed_hp"))


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder where no other process writes."""
    for path in folder.glob("*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


def cpu_count() -> int:
    """Return the number of cores that this process may use; under Slurm, those of its allocation."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", cores)))
