"""Files that are whole on disk, or not there, and the folder of those that can be made again."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which then takes the place of `path`, in one step and for good."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # `remove_left` knows them by this
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


def cache_dir() -> Path:
    """The user's own, or $DOMAINBED_HP_CACHE."""
    import pooch

    return Path(os.environ.get("DOMAINBED_HP_CACHE") or pooch.os_cache("domainbed_hp"))


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder where nobody else writes."""
    for path in folder.glob("*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


def cpu_count() -> int:
    """Return the number of cores that this process may use; under Slurm, those of its allocation."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, int(os.environ.get("SLURM_CPUS_ON_NODE", found)))
