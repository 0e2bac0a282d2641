"""A job: the arguments of a run, the folder that they name, and the list of a sweep's jobs in `sweep.json`."""

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
from typing import Any

import filelock

from domainbed_hp import run_dir
from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import State

TRAIN_MODULE = "domainbed_hp.scripts.train"
SWEEP_FILE = "sweep.json"
LAUNCHERS = "launchers"
"""Folder beside it: what each launcher at work claims."""
WHERE = ("data_dir", "device", "num_workers", "features", "compile")
"""Arguments that say where and how fast a job runs, and make no other job of it."""
# DEVIATION: DomainBed names a job after its data_dir too, so that moving the data orphans every finished job.
NOT_IDENTITY = ("output_dir", *WHERE)


def job_name(args: Mapping[str, Any]) -> str:
    """The md5 of the sorted JSON of `args`, 32 hex digits, as DomainBed's scripts/sweep.py."""
    return hashlib.md5(json.dumps(dict(args), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One run of a sweep: the arguments of `train`, without its output_dir, and the folder it writes to."""

    args: dict[str, Any]
    folder: Path

    @classmethod
    def under(cls, output_dir: Path, args: dict[str, Any]) -> "Job":
        identity = {key: value for key, value in args.items() if key not in NOT_IDENTITY}
        return cls(args, output_dir / job_name(identity))

    @property
    def state(self) -> State:
        return run_dir.read_state(self.folder)

    @property
    def row(self) -> str:
        return str(self.args.get("label", self.args["algorithm"]))

    @property
    def command(self) -> list[str]:
        """argv of the run, flags in sorted order; a list is several items, a boolean is a flag without a value."""
        command = [sys.executable, "-m", TRAIN_MODULE]
        for key, value in sorted({**self.args, "output_dir": self.folder}.items()):
            command.append(f"--{key}")
            if isinstance(value, list):
                command += [str(item) for item in value]
            elif value is not True:
                command.append(str(value))
        return command

    def describe(self, state: State) -> str:
        """One line, as DomainBed's; a failed job says why."""
        what = f"({self.args['dataset']!r}, {self.row!r}, {self.args['test_envs']}, {self.args['hparams_seed']})"
        why = f": {run_dir.read_failure(self.folder)}" if state == State.FAILED else ""
        return f"{state}: {self.folder} {what}{why}"

    def delete(self) -> None:
        """Remove the folder; `RunTaken` where the run is done or somebody works on it."""
        with run_dir.RunLock(self.folder):  # nobody starts it meanwhile
            for path in self.folder.iterdir():
                if path.name != run_dir.LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with contextlib.suppress(OSError):  # not empty: somebody starts it, afresh
            self.folder.rmdir()


def load_jobs(output_dir: Path) -> list[Job]:
    """The jobs that were launched into `output_dir`, without importing an algorithm."""
    return load_sweep(output_dir)[1]


def load_sweep(output_dir: Path) -> tuple[dict[str, Any], list[Job]]:
    """What sweep.json says of a sweep (version, spec, rows), and its jobs."""
    path = output_dir / SWEEP_FILE
    try:
        sweep = json.loads(path.read_text())
        jobs = [Job(job["args"], output_dir / job["folder"]) for job in sweep.pop("jobs")]
        if not all({"algorithm", "label"} <= row.keys() for row in sweep["rows"]):
            raise KeyError("rows")
    except FileNotFoundError as error:
        raise UsageError(f"{path} not found: no sweep was launched into {output_dir}; see --output_dir") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a sweep file ({error!r}); delete it and launch again") from error
    return sweep, jobs


@contextlib.contextmanager
def listed(output_dir: Path, sweep: Mapping[str, Any], jobs: Sequence[Job], part: bool = False) -> Iterator[None]:
    """List `jobs` in sweep.json, with what `sweep` says of them, and count among the sweep's launchers meanwhile.

    They may be `part` of a sweep: then all others stay listed.
    """
    folder = output_dir / LAUNCHERS
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / run_dir.LOCK, timeout=60):
                others = part or bool(launchers(output_dir))
                stack.enter_context(run_dir.RunLock(folder / f"{socket.gethostname()}-{os.getpid()}"))
                save(output_dir, sweep, jobs, others)
        except OSError as error:
            raise UsageError(f"{output_dir}: cannot be written to: {error.strerror or error}") from error
        yield


def launchers(output_dir: Path) -> list[float]:
    """When those that are at work on a sweep began."""
    began = []
    for folder in (output_dir / LAUNCHERS).glob("*-*"):
        with contextlib.suppress(OSError):  # it ends just now
            if run_dir.read_holder(folder):
                began.append(folder.stat().st_mtime)  # of the folder: its last change was the lock's creation
    return began


def save(output_dir: Path, sweep: Mapping[str, Any], jobs: Sequence[Job], others: bool) -> None:
    """Write sweep.json whole or not at all; what earlier launches left in the folder stays listed.

    What they never started does not, or a launch by mistake would count for ever, unless `others` are at work on it.
    """
    path = output_dir / SWEEP_FILE
    earlier: list[Job] = []
    rows = {row["label"]: row for row in sweep["rows"]}
    if path.exists():
        folders = {job.folder for job in jobs}
        earlier = [job for job in load_jobs(output_dir) if job.folder not in folders]
        earlier = [job for job in earlier if others or job.state != State.NOT_LAUNCHED]
    if earlier:
        used = {job.row for job in earlier} | set(rows)
        rows = {row["label"]: row for row in json.loads(path.read_text())["rows"] if row["label"] in used} | rows
    entries = [{"folder": job.folder.name, "args": job.args} for job in [*jobs, *earlier]]
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps({**sweep, "rows": list(rows.values()), "jobs": entries}, indent=1) + "\n")
