"""Launch the jobs of a sweep, show their states, or delete the jobs that are not finished."""

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domainbed_hp.plugins import import_plugins
from domainbed_hp.registry import LAUNCHERS, UsageError
from domainbed_hp.run_args import add_flags
from domainbed_hp.run_dir import EXIT_TAKEN, RunTaken, State
from domainbed_hp.scripts import run
from domainbed_hp.sweep.config import read_jobs, spec_from
from domainbed_hp.sweep.jobs import SWEEP_FILE, Job, load_jobs, load_sweep, register_launcher
from domainbed_hp.sweep.spec import SweepSpec, describe_sweep, load_launcher, make_jobs
from domainbed_hp.sweep.status import SweepStatus, estimate_cost
from domainbed_hp.sweep.validation import check_data, resolve_rows

EPILOG = """\
A job is one run of `train`. A job is incomplete if its run stopped before its end without an error.
`launch` starts new jobs, and continues incomplete ones where they stopped. It skips jobs that are done, running or
failed. Several launchers may work on one sweep, on machines that share its folder. Without flags, `launch` runs the
quickstart: a small sweep on the CPU, in results/quickstart.
`status` and `delete_incomplete` read <output_dir>/sweep.json (without flags: results/quickstart/sweep.json). With
flags that describe a sweep, they act on the jobs of that sweep. `delete_incomplete` removes the folders of incomplete
and failed jobs, so that they start from step 0. It never removes a running job.
"""
COMMAND = ("python", "-m", "domainbed_hp.scripts.sweep")
EXIT_INTERRUPTED = 130
ONLY = {"retry_failed": "launch", "dry_run": "launch", "jobs": "launch", "json": "status"}
"""Flags of one command alone."""
NOT_SETTINGS = ("command", "config", "seed", "skip_confirmation", "list", *ONLY)
"""Arguments that are no settings of a sweep."""


def make_parser() -> argparse.ArgumentParser:
    # Defaults are None, so that the sweep file's value stays where a flag is not given.
    p = argparse.ArgumentParser(
        " ".join(COMMAND), description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("command", choices=["launch", "status", "delete_incomplete"], help="see below")
    add = p.add_argument_group("which runs").add_argument
    add("--config", metavar="FILE", help="sweep file (TOML), such as sweeps/*.toml; other flags override it")
    add("--jobs", metavar="FILE", help="launch: run the jobs that `collect_results --missing FILE` wrote")
    add("--output_dir", metavar="DIR", help="folder of the sweep (required, unless --config names it)")
    add("--datasets", nargs="+", metavar="NAME", help="data sets, or folder:PATH (default: all but Debug28, Debug224)")
    rows = "algorithms (default: all); with --config: the file's rows of these algorithms only"
    add("--algorithms", nargs="+", metavar="NAME", help=rows)
    add("--hparams", metavar="JSON", help="hyperparameters for every algorithm that has them; they override the file")
    add("--n_hparams_from", type=int, metavar="N", help="first hparams_seed (default: 0)")
    add("--n_hparams", type=int, metavar="N", help="last hparams_seed + 1 (default: 20)")
    add("--n_trials", type=int, metavar="N", help="number of trials (default: 3)")
    add("--n_trials_from", type=int, metavar="N", help="first trial_seed (default: 0)")
    add("--single_test_envs", action="store_true", default=None, help="hold out one environment in each job, never two")
    text = "environments to hold out: `0 2`: one job without 0, one without 2; `0,2`: one job without both"
    add("--test_envs", nargs="+", metavar="ENVS", help=text)
    add("--seed", type=int, metavar="N", help="ignored, as in DomainBed: a job's seed is a hash of its arguments")
    add = p.add_argument_group("launching").add_argument
    known = ", ".join(LAUNCHERS)
    add("--command_launcher", dest="launcher", metavar="NAME", help=f"launcher: {known} (default: local)")
    add("--max_parallel", type=int, metavar="N", help="local, slurm: jobs at a time (default: one per core; all)")
    add("--jobs_per_gpu", type=int, metavar="N", help="multi_gpu: jobs at a time on one GPU (default: 1)")
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="slurm: long options of sbatch, such as partition=gpu mem=16GB")
    add("--launcher_options", nargs="+", metavar="KEY=VALUE", help="options of your own launcher")
    add("--skip_confirmation", action="store_true", help="do not ask `Are you sure?`")
    add("--retry_failed", action="store_true", help="launch: also start the failed jobs")
    add("--dry_run", action="store_true", help="launch: print the jobs and an estimate of their cost; start nothing")
    add = p.add_argument_group("what is printed").add_argument
    add("--list", action="store_true", help="print a line for every job (default: for failed jobs only)")
    add("--json", action="store_true", help="status: print JSON")
    add_flags(p, of_sweep=True)
    return p


def ask_user() -> bool:
    """Return the user's answer; `UsageError` where there is no terminal to ask on."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "stdin is not a terminal, so the question `Are you sure?` cannot be asked; pass --skip_confirmation"
        )
    with contextlib.suppress(EOFError):  # Ctrl-D
        if input("Are you sure? (y/n) ").lower().strip()[:1] == "y":
            return True
    print("Nevermind!")
    return False


def print_status(status: SweepStatus, list_all: bool) -> None:
    # DEVIATION: DomainBed prints a line for every job. Among thousands, the failed ones would be overlooked.
    for line in status.list_jobs(*(State if list_all else [State.FAILED])):
        print(line)
    print(status.summarize())


def launch(spec: SweepSpec, args: argparse.Namespace, command: str, part: Sequence[Job] = ()) -> int:
    """Check a sweep, start its new and incomplete jobs (with --retry_failed also failed ones), return the exit code.

    The exit code is 1 if a job failed or stopped, and 130 after an interrupt.

    Args:
        command: the command line itself, to print how to continue.
        part: the only jobs to launch; without them, all of the sweep.
    """
    import_plugins(spec.run_args.imports)
    launcher = load_launcher(spec)
    rows = resolve_rows(spec)
    jobs = list(part) or make_jobs(spec, rows)
    check_data(spec, rows)
    before = SweepStatus.of(jobs)
    # DEVIATION: DomainBed's incomplete jobs have to be deleted first.
    wanted = [State.NOT_LAUNCHED, State.INCOMPLETE] + [State.FAILED] * args.retry_failed
    to_launch = before.select_jobs(*wanted)
    if args.dry_run:
        print(*before.list_jobs(*wanted), before.summarize(), f"Would launch {len(to_launch)} jobs.", sep="\n")
        print(estimate_cost(to_launch, before.select_jobs(State.DONE), launcher.keywords.get("max_parallel")))
        return 0

    print_status(before, args.list)
    resumed = before.count[State.INCOMPLETE]
    more = f" {resumed} of them continue where they stopped." if resumed else ""
    print(f"About to launch {len(to_launch)} jobs.{more}", flush=True)
    if to_launch and not args.skip_confirmation and not ask_user():
        return 0
    output_dir = Path(spec.output_dir)
    known = part and (output_dir / SWEEP_FILE).exists()  # then sweep.json has the settings of the whole sweep
    description = load_sweep(output_dir)[0] if known else describe_sweep(spec, rows)
    with register_launcher(output_dir, description, jobs, partial=bool(part)):
        try:
            codes = launcher([job.command for job in to_launch]) if to_launch else []
        except KeyboardInterrupt:
            return report_interrupt(jobs, command)
    taken = codes.count(EXIT_TAKEN)
    more = f" {taken} were taken by another launcher." if taken else ""
    print(f"Launched {len(to_launch) - taken} jobs!{more}")
    return report_end(SweepStatus.of(jobs), dict(zip((job.folder for job in to_launch), codes, strict=True)), command)


def report_interrupt(jobs: Sequence[Job], command: str) -> int:
    now = SweepStatus.of(jobs)
    running = now.count[State.RUNNING]
    left = f"{running} are still running." if running else "Incomplete ones continue from the state that they saved."
    print(f"Interrupted: {now.summarize()} {left}\nTo continue: {command}", file=sys.stderr)
    return EXIT_INTERRUPTED


def report_end(now: SweepStatus, codes: Mapping[Path, int], command: str) -> int:
    """Print which jobs failed or stopped, and how to continue; return 1 if any did.

    Args:
        codes: exit codes of the jobs that were launched, by folder.
        command: the command line of the launch.
    """
    failed = now.list_jobs(State.FAILED)
    stopped = [
        f"exit code {codes[job.folder]}: {job.describe(job.state)}"
        for job in now.select_jobs(State.INCOMPLETE, State.NOT_LAUNCHED)
        if codes.get(job.folder, 0) not in (0, EXIT_TAKEN)
    ]
    if failed:
        retry = command if "--retry_failed" in command else f"{command} --retry_failed"
        print(f"{len(failed)} of {len(now.jobs)} jobs failed:", *failed, sep="\n", file=sys.stderr)
        print(f"To try them again: {retry}", file=sys.stderr)
    if stopped:
        print(f"{len(stopped)} jobs stopped before they were done:", *stopped, sep="\n", file=sys.stderr)
        print(f"To continue: {command}", file=sys.stderr)
    if now.count[State.DONE] == len(now.jobs):
        folder = shlex.quote(str(now.jobs[0].folder.parent))
        print(f"For the tables: python -m domainbed_hp.scripts.collect_results --input_dir {folder}")
    return 1 if failed or stopped else 0


def find_jobs(config: str | None, flags: dict[str, Any]) -> list[Job]:
    """Return the jobs for `status` and `delete_incomplete`, without algorithms if the folder alone is named."""
    if set(flags) <= {"output_dir"}:
        output_dir = Path(flags.get("output_dir") or spec_from(config, flags).output_dir)
        if (output_dir / SWEEP_FILE).exists() or not config:
            return load_jobs(output_dir)
    spec = spec_from(config, flags)
    return make_jobs(spec, resolve_rows(spec))


def delete_incomplete(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Remove the folders of incomplete and failed jobs. For DomainBed, too, a failed job is incomplete."""
    before = SweepStatus.of(jobs)
    print_status(before, args.list)
    to_delete = before.select_jobs(State.INCOMPLETE, State.FAILED)
    print(f"About to delete {len(to_delete)} jobs.", flush=True)
    if to_delete and not args.skip_confirmation and not ask_user():
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
    running = before.count[State.RUNNING] + len(to_delete) - deleted
    more = f" {running} are running and were not deleted." if running else ""
    print(f"Deleted {deleted} jobs!{more}")
    return 0


def show_status(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    now = SweepStatus.of(jobs)
    if args.json:
        print(json.dumps(now.to_json(), indent=1))
        return 0
    if table := now.make_table():
        print(table)
    print_status(now, args.list)
    if rate := now.describe_rate():
        print(rate)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(argv)
    for name, owner in ONLY.items():
        if getattr(args, name) and args.command != owner:
            raise UsageError(f"--{name} is a flag of `{owner}`, not of `{args.command}`")
    flags = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS and value is not None}
    command = shlex.join([*COMMAND, *argv])
    if args.jobs:
        if args.config:
            raise UsageError("--config with --jobs: both say what to launch; give one of them")
        code = 0
        for spec, jobs in read_jobs(args.jobs, flags):
            code = max(code, launch(spec, args, command, jobs))
            if code == EXIT_INTERRUPTED:  # the user stopped all of it, not this sweep alone
                break
        return code
    if args.command == "launch":
        spec = spec_from(args.config, flags)
        args.skip_confirmation |= not (args.config or flags) or spec.launcher == "dummy"  # these two ask nothing
        return launch(spec, args, command)
    flags.pop("launcher", None)
    jobs = find_jobs(args.config, flags)
    return show_status(jobs, args) if args.command == "status" else delete_incomplete(jobs, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children must not outlive their launcher
    sys.exit(run(main))
