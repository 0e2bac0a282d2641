"""Launch a table of runs, tell how far it is, delete what was interrupted."""

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domainbed_hp import registry
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, RunTaken, State
from domainbed_hp.scripts import run
from domainbed_hp.scripts.train import parser as train_parser
from domainbed_hp.sweep.config import read_jobs, spec_from
from domainbed_hp.sweep.jobs import SWEEP_FILE, Job, listed, load_jobs, load_sweep
from domainbed_hp.sweep.spec import CHOICES, SweepSpec, described, launcher_of, make_jobs
from domainbed_hp.sweep.status import Progress, estimate
from domainbed_hp.sweep.validation import check_data, resolve_rows

EPILOG = """\
`launch` without any flag runs the quickstart: a small table on the CPU, into results/quickstart. It starts what is not
launched and what is incomplete, which goes on where it stopped; what is done, running or failed is left alone. Any
number of launchers may work on one sweep, on machines that share its folder.
`delete_incomplete` removes what is incomplete or failed, never what is running, so that it starts afresh.
`status` and `delete_incomplete` read <output_dir>/sweep.json (results/quickstart without a flag), unless more flags say
which jobs are meant. A sweep file (TOML) holds the same settings; sweeps/*.toml are examples.
"""
COMMAND = ("python", "-m", "domainbed_hp.scripts.sweep")
ONLY = {"retry_failed": "launch", "dry_run": "launch", "jobs": "launch", "json": "status"}
"""Flags that one command alone knows."""
NOT_SETTINGS = ("command", "config", "seed", "skip_confirmation", "list", *ONLY)


def parser() -> argparse.ArgumentParser:
    # Defaults are None: a flag that is not given leaves the sweep file's value, or SweepSpec's default, in force.
    p = argparse.ArgumentParser(
        " ".join(COMMAND),
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument("command", choices=["launch", "status", "delete_incomplete"])
    p.add_argument("--config", help="sweep file; flags given beside it override it")
    p.add_argument("--jobs", metavar="FILE", help="launch: the jobs of a file by `collect_results --missing`")
    p.add_argument("--datasets", nargs="+", help="default: all but the Debug ones; folder:PATH is one of your own")
    p.add_argument(
        "--algorithms", nargs="+", help="rows with default hparams; beside --config: the file's rows of these"
    )
    p.add_argument("--task", choices=CHOICES["task"])
    p.add_argument("--n_hparams_from", type=int, help="first hparams seed; 0 = default hparams")
    p.add_argument("--n_hparams", type=int, help="hparams seeds end below this (default 20)")
    p.add_argument("--output_dir")
    p.add_argument("--data_dir", help="folder that holds the data sets' folders")
    p.add_argument("--seed", type=int, help="not used, as in DomainBed: a job's seed is hashed from its arguments")
    p.add_argument("--n_trials", type=int, help="default 3")
    p.add_argument("--n_trials_from", type=int, help="the first trial's seed (default 0)")
    p.add_argument("--command_launcher", dest="launcher", help=f"default local; known: {', '.join(registry.LAUNCHERS)}")
    p.add_argument("--max_parallel", type=int, help="jobs at a time; default: the launcher's")
    p.add_argument("--jobs_per_gpu", type=int, help="multi_gpu: jobs at a time on each (default 1)")
    p.add_argument("--slurm", nargs="+", metavar="KEY=VALUE", help="slurm: partition=gpu mem=16GB ...")
    p.add_argument("--steps", type=int)
    p.add_argument("--checkpoint_freq", type=int)
    p.add_argument("--hparams", help="JSON object, for every algorithm that knows the name; wins over the sweep file")
    p.add_argument("--holdout_fraction", type=float, help="default 0.2")
    p.add_argument("--uda_holdout_fraction", type=float, help="of test environments, for domain_adaptation")
    p.add_argument("--eval", choices=CHOICES["eval"], help="fast: score only what selection rules read")
    p.add_argument("--eval_images", type=int, help="score at most so many images of a split")
    p.add_argument("--precision", choices=CHOICES["precision"])
    on_gpu = "auto: on a GPU capture steps, and compile them in long runs; off: neither"
    p.add_argument("--compile", choices=CHOICES["compile"], help=on_gpu)
    p.add_argument("--device")
    p.add_argument("--loader", choices=CHOICES["loader"], help="reference: DomainBed's, in Pillow")
    p.add_argument("--features", choices=CHOICES["features"], help="of a frozen tower: kept, or not")
    p.add_argument("--num_workers", type=int, help="loader threads of each job")
    p.add_argument("--save", choices=CHOICES["save"], help="of the models: what trained, or all")
    p.add_argument("--keep", choices=CHOICES["keep"], help="best: also the model by training-domain validation")
    p.add_argument(
        "--import", dest="imports", nargs="+", metavar="MODULE", help="modules of your own: algorithms, data sets"
    )
    p.add_argument("--single_test_envs", action="store_true", default=None, help="no pairs of test environments")
    p.add_argument(
        "--test_envs", nargs="+", metavar="ENVS", help="these alone, in turn: `0 2` is two runs, `0,2` one without both"
    )
    p.add_argument("--skip_model_save", action="store_true", default=None)
    p.add_argument("--skip_confirmation", action="store_true", help="do not ask")
    p.add_argument("--retry_failed", action="store_true", help="launch: the failed jobs, too")
    p.add_argument(
        "--dry_run", action="store_true", help="launch: print the jobs and what they may cost, write nothing"
    )
    p.add_argument("--list", action="store_true", help="one line per job, as DomainBed; else the failed ones alone")
    p.add_argument("--json", action="store_true", help="status: for machines")
    return p


def confirmed() -> bool:
    """The user's yes; never asked where nobody can answer."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "stdin is not a terminal, so the question `Are you sure?` cannot be asked: --skip_confirmation"
        )
    with contextlib.suppress(EOFError):  # Ctrl-D
        if input("Are you sure? (y/n) ").lower().strip()[:1] == "y":
            return True
    print("Nevermind!")
    return False


def show(progress: Progress, list_all: bool) -> None:
    # DEVIATION: DomainBed prints a line per job; of thousands of lines those that matter are lost.
    for line in progress.lines(*(State if list_all else [State.FAILED])):
        print(line)
    print(progress.summary())


def launch(spec: SweepSpec, args: argparse.Namespace, again: str, given: Sequence[Job] = ()) -> int:
    """Check everything, then start what is not done; 1 if something failed. `again` is the command itself.

    The jobs are those of `spec`, unless they are `given`.
    """
    launcher = launcher_of(spec)
    rows = resolve_rows(spec)
    jobs = list(given) or make_jobs(spec, rows)
    check_data(spec, rows)
    before = Progress.of(jobs)
    # DEVIATION: DomainBed's incomplete jobs have to be deleted first.
    wanted = [State.NOT_LAUNCHED, State.INCOMPLETE] + [State.FAILED] * args.retry_failed
    to_launch = before.among(*wanted)
    if args.dry_run:
        print(*before.lines(*wanted), before.summary(), f"Would launch {len(to_launch)} jobs.", sep="\n")
        print(estimate(to_launch, before.among(State.DONE), spec.max_parallel))
        return 0

    show(before, args.list)
    resumed = before.count[State.INCOMPLETE]
    more = f" {resumed} of them go on where they stopped." if resumed else ""
    print(f"About to launch {len(to_launch)} jobs.{more}", flush=True)
    if to_launch and not args.skip_confirmation and not confirmed():
        return 0
    output_dir = Path(spec.output_dir)
    # Jobs that are given are a part of a sweep, whose settings stay on record.
    known = given and (output_dir / SWEEP_FILE).exists()
    with listed(output_dir, load_sweep(output_dir)[0] if known else described(spec, rows), jobs, part=bool(given)):
        try:
            codes = launcher([job.command for job in to_launch]) if to_launch else []
        except KeyboardInterrupt:
            return interrupted(jobs, again)
    taken = codes.count(EXIT_TAKEN)
    more = f" {taken} were taken by another launcher." if taken else ""
    print(f"Launched {len(to_launch) - taken} jobs!{more}")
    return report(Progress.of(jobs), dict(zip((job.folder for job in to_launch), codes, strict=True)), again)


def interrupted(jobs: Sequence[Job], again: str) -> int:
    now = Progress.of(jobs)
    running = now.count[State.RUNNING]
    kept = f"{running} still run." if running else "Incomplete ones go on from the state that they saved."
    print(f"Interrupted: {now.summary()} {kept}\nTo go on: {again}", file=sys.stderr)
    return 130


def report(now: Progress, codes: dict[Path, int], again: str) -> int:
    """Say on stderr what failed and how to go on; 1 if something did. `codes` are the exit codes by folder."""
    failed = now.lines(State.FAILED)
    stopped = [
        f"exit code {codes[job.folder]}: {job.describe(job.state)}"
        for job in now.among(State.INCOMPLETE, State.NOT_LAUNCHED)
        if codes.get(job.folder, 0) not in (0, EXIT_TAKEN)
    ]
    if failed:
        print(f"{len(failed)} of {len(now.jobs)} jobs failed:", *failed, sep="\n", file=sys.stderr)
        print(f"To try them again: {again}{'' if '--retry_failed' in again else ' --retry_failed'}", file=sys.stderr)
    if stopped:
        print(f"{len(stopped)} jobs stopped before they were done:", *stopped, sep="\n", file=sys.stderr)
        print(f"To go on: {again}", file=sys.stderr)
    if now.count[State.DONE] == len(now.jobs):
        folder = shlex.quote(str(now.jobs[0].folder.parent))
        print(f"For the tables: python -m domainbed_hp.scripts.collect_results --input_dir {folder}")
    return 1 if failed or stopped else 0


def existing_jobs(config: str | None, flags: dict[str, Any]) -> list[Job]:
    """The jobs that `status` and `delete_incomplete` speak of; imports no algorithm where only the folder is named."""
    if set(flags) <= {"output_dir"}:
        output_dir = Path(flags.get("output_dir") or spec_from(config, flags).output_dir)
        if (output_dir / SWEEP_FILE).exists() or not config:
            return load_jobs(output_dir)
    spec = spec_from(config, flags)
    return make_jobs(spec, resolve_rows(spec))


def delete_incomplete(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Remove the folders of jobs that are incomplete or failed; to DomainBed, too, a failed job is incomplete."""
    before = Progress.of(jobs)
    show(before, args.list)
    to_delete = before.among(State.INCOMPLETE, State.FAILED)
    print(f"About to delete {len(to_delete)} jobs.", flush=True)
    if to_delete and not args.skip_confirmation and not confirmed():
        return 0

    def delete(job: Job) -> bool:
        try:
            job.delete()
        except RunTaken:
            return False
        return True

    # DEVIATION: DomainBed removes running jobs.
    with ThreadPoolExecutor(32) as pool:  # a lease that another host left is watched for a minute
        deleted = sum(pool.map(delete, to_delete))
    spared = before.count[State.RUNNING] + len(to_delete) - deleted
    more = f" {spared} are running and stay." if spared else ""
    print(f"Deleted {deleted} jobs!{more}")
    return 0


def status(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    now = Progress.of(jobs)
    if args.json:
        print(json.dumps(now.to_json(), indent=1))
        return 0
    if table := now.table():
        print(table)
    show(now, args.list)
    if speed := now.speed():
        print(speed)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    for name, owner in ONLY.items():
        if getattr(args, name) and args.command != owner:
            raise UsageError(f"--{name} is a flag of `{owner}`, not of `{args.command}`")
    flags = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS and value is not None}
    if args.jobs:
        if args.config:
            raise UsageError("--config with --jobs: either says what to launch; give one")
        sweeps = read_jobs(args.jobs, flags)
        known = ["import", *vars(train_parser().parse_args([]))]
        if strange := [name for _, jobs in sweeps for job in jobs for name in job.args if name not in known]:
            raise registry.unknown_name(f"argument of train in {args.jobs}:", strange[0], known)
        return max(launch(spec, args, shlex.join([*COMMAND, *argv]), jobs) for spec, jobs in sweeps)
    if args.command == "launch":
        spec = spec_from(args.config, flags)
        args.skip_confirmation |= not (args.config or flags) or spec.launcher == "dummy"  # the quickstart asks nothing
        return launch(spec, args, shlex.join([*COMMAND, *argv]))
    flags.pop("launcher", None)
    jobs = existing_jobs(args.config, flags)
    return status(jobs, args) if args.command == "status" else delete_incomplete(jobs, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children must not outlive their launcher
    sys.exit(run(main))
