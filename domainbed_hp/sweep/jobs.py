"""Jobs, each a run with its arguments and folder, and the list of a sweep's jobs in its `sweep.json`."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import filelock

from domainbed_hp import run_dir
from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import WHERE
from domainbed_hp.run_dir import State

TRAIN_MODULE = "domainbed_hp.scripts.train"
SWEEP_FILE = "sweep.json"
LAUNCHERS_FOLDER = "launchers"
"""Name of the folder, in that of a sweep, with a folder for each launcher at work."""


def make_job_name(args: Mapping[str, Any]) -> str:
    """Return the md5 of the sorted JSON of `args`, 32 hex digits, as DomainBed's scripts/sweep.py."""
    return hashlib.md5(json.dumps(dict(args), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    args: dict[str, Any]
    """Name of a flag of `train` -> value, without output_dir."""
    folder: Path
    """The run's output_dir."""

    @classmethod
    def create(cls, output_dir: Path, args: dict[str, Any]) -> Self:
        """Return the job with these arguments. Its folder in `output_dir` has its name."""
        return cls(args, output_dir / make_job_name({name: v for name, v in args.items() if name not in WHERE}))

    @property
    def state(self) -> State:
        """State of the run, as its folder shows it."""
        return run_dir.read_state(self.folder)

    @property
    def row(self) -> str:
        """Label of the run's row in tables."""
        return str(self.args.get("label", self.args["algorithm"]))

    @property
    def summary(self) -> str:
        """Folder, data set, row, test environments and hparams_seed, as in DomainBed's lines."""
        facts = f"({self.args['dataset']!r}, {self.row!r}, {self.args['test_envs']}, {self.args['hparams_seed']})"
        return f"{self.folder} {facts}"

    @property
    def command(self) -> list[str]:
        """Command line of the run. Flags are sorted; a list becomes several items, True a flag without a value."""
        command = [sys.executable, "-m", TRAIN_MODULE]
        for key, value in sorted({**self.args, "output_dir": self.folder}.items()):
            command.append(f"--{key}")
            if isinstance(value, list):
                command += [str(item) for item in value]
            elif value is not True:
                command.append(str(value))
        return command

    def describe(self, state: State) -> str:
        """Return one line, as DomainBed's, with the error of a failed job."""
        reason = f": {run_dir.read_failure(self.folder)}" if state == State.FAILED else ""
        return f"{state}: {self.summary}{reason}"

    def delete(self) -> None:
        """Remove the job's folder; `RunTaken` if the run is done or a process works on it."""
        with run_dir.RunLock(self.folder):  # no other process starts the job meanwhile
            for path in self.folder.iterdir():
                if path.name != run_dir.LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with contextlib.suppress(OSError):  # not empty: another process starts the job again
            self.folder.rmdir()


def load_jobs(output_dir: Path) -> list[Job]:
    """Return the jobs that were launched into `output_dir`. No algorithm is imported."""
    return load_sweep(output_dir)[1]


def load_sweep(output_dir: Path) -> tuple[dict[str, Any], list[Job]]:
    """Return the description of a sweep in its sweep.json (version, spec, rows) and its jobs."""
    path = output_dir / SWEEP_FILE
    try:
        sweep = json.loads(path.read_text())
        jobs = [Job(job["args"], output_dir / job["folder"]) for job in sweep.pop("jobs")]
        if not all({"algorithm", "label"} <= row.keys() for row in sweep["rows"]):
            raise KeyError("rows")
    except FileNotFoundError as error:
        raise UsageError(f"{path} not found: no sweep was launched into {output_dir}; pass --output_dir") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Check its permissions and the disk") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a sweep file ({error!r}); delete it and launch again") from error
    return sweep, jobs


@contextlib.contextmanager
def register_launcher(
    output_dir: Path, sweep: Mapping[str, Any], jobs: Sequence[Job], *, partial: bool = False
) -> Iterator[None]:
    """List `jobs` in sweep.json and count this process among the sweep's launchers inside the `with` block.

    Args:
        sweep: description of the sweep, the other keys of sweep.json.
        partial: True if the sweep has more jobs than these; all of them stay listed.
    """
    folder = output_dir / LAUNCHERS_FOLDER
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / run_dir.LOCK, timeout=60):
                at_work = bool(find_launchers(output_dir))
                stack.enter_context(run_dir.RunLock(folder / f"{socket.gethostname()}-{os.getpid()}"))
                save_sweep(output_dir, sweep, jobs, list_all=partial or at_work)
        except OSError as error:
            raise UsageError(f"{output_dir}: cannot be written to: {error.strerror or error}") from error
        yield


def find_launchers(output_dir: Path) -> list[float]:
    """Return the start of each launcher that is at work on a sweep, in seconds since the epoch."""
    started = []
    for folder in (output_dir / LAUNCHERS_FOLDER).glob("*-*"):
        with contextlib.suppress(OSError):  # the launcher ends just now
            if run_dir.read_holder(folder):
                started.append(folder.stat().st_mtime)  # of the folder: its last change was the creation of the lock
    return started


def save_sweep(output_dir: Path, sweep: Mapping[str, Any], jobs: Sequence[Job], *, list_all: bool) -> None:
    """Write sweep.json. Jobs of earlier launches stay listed if they have a folder, and with `list_all` all of them.

    With `list_all` another launcher will start them. Without it, a launch with wrong arguments leaves no jobs behind.
    """
    path = output_dir / SWEEP_FILE
    earlier: list[Job] = []
    rows = {row["label"]: row for row in sweep["rows"]}
    if path.exists():
        folders = {job.folder for job in jobs}
        earlier = [job for job in load_jobs(output_dir) if job.folder not in folders]
        earlier = [job for job in earlier if list_all or job.state != State.NOT_LAUNCHED]
    if earlier:
        used = {job.row for job in earlier} | set(rows)
        rows = {row["label"]: row for row in json.loads(path.read_text())["rows"] if row["label"] in used} | rows
    entries = [{"folder": job.folder.name, "args": job.args} for job in [*jobs, *earlier]]
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps({**sweep, "rows": list(rows.values()), "jobs": entries}, indent=1) + "\n")
