"""Launch a table of runs, tell how far it is, delete what was interrupted."""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from domainbed_hp import registry
from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run
from domainbed_hp.sweep import (
    CHOICES,
    SWEEP_FILE,
    Job,
    Row,
    SweepSpec,
    check_data,
    load_jobs,
    make_jobs,
    resolve_rows,
    save,
)

EPILOG = """\
`launch` without any flag runs the quickstart: a small table on the CPU, into results/quickstart.
`status` and `delete_incomplete` read <output_dir>/sweep.json (results/quickstart without a flag), unless more flags say
which jobs are meant. A sweep file (TOML) holds the same settings; sweeps/*.toml are examples.
"""


def parser() -> argparse.ArgumentParser:
    # Defaults are None: a flag that is not given leaves the sweep file's value, or SweepSpec's default, in force.
    p = argparse.ArgumentParser(
        "python -m domainbed_hp.scripts.sweep",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument("command", choices=["launch", "status", "delete_incomplete"])
    p.add_argument("--config", help="sweep file; flags given beside it override it")
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
    p.add_argument("--command_launcher", dest="launcher", help=f"default local; known: {', '.join(registry.LAUNCHERS)}")
    p.add_argument("--max_parallel", type=int, help="jobs at a time; default: the launcher's")
    p.add_argument("--steps", type=int)
    p.add_argument("--checkpoint_freq", type=int)
    p.add_argument("--hparams", help="JSON object, for every algorithm that knows the name; wins over the sweep file")
    p.add_argument("--holdout_fraction", type=float, help="default 0.2")
    p.add_argument("--eval_images", type=int, help="score at most so many images of a split")
    p.add_argument("--precision", choices=CHOICES["precision"])
    p.add_argument("--device")
    p.add_argument("--loader", choices=CHOICES["loader"], help="reference: DomainBed's, in Pillow")
    p.add_argument("--num_workers", type=int, help="loader threads of each job")
    p.add_argument(
        "--import", dest="imports", nargs="+", metavar="MODULE", help="modules of your own: algorithms, data sets"
    )
    p.add_argument("--single_test_envs", action="store_true", default=None, help="no pairs of test environments")
    p.add_argument("--skip_model_save", action="store_true", default=None)
    p.add_argument("--skip_confirmation", action="store_true", help="do not ask")
    return p


def read_sweep_file(path: str | None) -> dict[str, Any]:
    """The contents of a sweep file; without a path the packaged quickstart."""
    try:
        file = Path(path) if path else resources.files("domainbed_hp") / "sweeps" / "quickstart.toml"
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error


def parse_hparams(text: str) -> dict[str, Any]:
    try:
        hparams = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--hparams {text!r}: not valid JSON: {error}") from error
    if not isinstance(hparams, dict) or any(isinstance(value, dict) for value in hparams.values()):
        raise UsageError(f"--hparams {text!r}: expected an object of names and values, e.g. '{{\"lr\": 1e-5}}'")
    return hparams


def spec_from(config: str | None, flags: dict[str, Any]) -> SweepSpec:
    """The sweep that a file and flags describe; flags win. Neither: the quickstart."""
    source = f"--config {config}" if config else "flags" if flags else "quickstart"
    others = {name: value for name, value in flags.items() if name not in ("algorithms", "hparams")}
    algorithms = flags.get("algorithms") or ([] if config or not flags else list(registry.ALGORITHMS))
    if config or not flags:
        values = read_sweep_file(config)
    else:
        datasets = [name for name in registry.DATASETS if not name.startswith("Debug")]
        values = {"datasets": datasets, "rows": [{"algorithm": name} for name in algorithms]}
    if "single_test_envs" in others:
        values.pop("test_envs", None)
    spec = SweepSpec.of(values | others, source)

    if algorithms:
        new = [Row(name) for name in algorithms if name not in {row.algorithm for row in spec.rows}]
        spec = replace(spec, rows=(*(row for row in spec.rows if row.algorithm in algorithms), *new))
    return override(spec, parse_hparams(flags["hparams"])) if "hparams" in flags else spec


def override(spec: SweepSpec, hparams: dict[str, Any]) -> SweepSpec:
    """`hparams` for every algorithm that knows the name, also where a row or an algorithm sets its own value."""

    def won(table: dict[str, Any]) -> dict[str, Any]:
        return table | {name: value for name, value in hparams.items() if name in table}

    fixed = {name: won(value) if isinstance(value, dict) else value for name, value in spec.hparams.items()}
    rows = tuple(replace(row, hparams=won(row.hparams)) for row in spec.rows)
    return replace(spec, rows=rows, hparams=fixed | hparams)


def confirmed() -> bool:
    """The user's yes; never asked where nobody can answer."""
    if not sys.stdin.isatty():
        raise UsageError(
            "stdin is not a terminal, so the question `Are you sure?` cannot be asked: --skip_confirmation"
        )
    if input("Are you sure? (y/n) ").lower().strip()[:1] == "y":
        return True
    print("Nevermind!")
    return False


def print_status(jobs: Sequence[Job]) -> None:
    for job in jobs:
        print(job)
    count = Counter(job.state for job in jobs)
    numbers = (len(jobs), count[Job.DONE], count[Job.INCOMPLETE], count[Job.NOT_LAUNCHED])
    print("{} jobs: {} done, {} incomplete, {} not launched.".format(*numbers))


def launch(spec: SweepSpec, ask: bool) -> int:
    """Check everything, then start the jobs that are not launched yet; 1 if one of them failed."""
    launcher = registry.load(registry.LAUNCHERS, "launcher", spec.launcher)
    rows = resolve_rows(spec)
    jobs = make_jobs(spec, rows)
    check_data(spec, rows)
    print_status(jobs)
    to_launch = [job for job in jobs if job.state == Job.NOT_LAUNCHED]
    incomplete = sum(job.state == Job.INCOMPLETE for job in jobs)
    print(f"About to launch {len(to_launch)} jobs.", flush=True)
    if to_launch and ask and not confirmed():
        return 0

    save(spec, rows, jobs)
    folder = shlex.quote(spec.output_dir)
    again = f"python -m domainbed_hp.scripts.sweep delete_incomplete --output_dir {folder}"
    limit = {} if spec.max_parallel is None else {"max_parallel": spec.max_parallel}
    try:
        codes = launcher([job.command for job in to_launch], **limit)
    except KeyboardInterrupt:
        print(f"Interrupted. To go on: {again}\nand launch again; jobs that are done stay.", file=sys.stderr)
        return 130
    print(f"Launched {len(to_launch)} jobs!")
    failed = [(job, code) for job, code in zip(to_launch, codes, strict=True) if code != 0]
    if failed:
        print(f"{len(failed)} of {len(to_launch)} jobs failed:", file=sys.stderr)
        for job, code in failed:
            print(f"exit code {code}: {job}", file=sys.stderr)
    if incomplete or failed:
        print(f"{incomplete + len(failed)} incomplete jobs are not launched again before: {again}", file=sys.stderr)
    if all(job.state == Job.DONE for job in jobs):
        print(f"For the tables: python -m domainbed_hp.scripts.collect_results --input_dir {folder}")
    return 1 if failed else 0


def existing_jobs(config: str | None, flags: dict[str, Any]) -> list[Job]:
    """The jobs that `status` and `delete_incomplete` speak of; imports no algorithm where only the folder is named."""
    if set(flags) <= {"output_dir"}:
        output_dir = Path(flags.get("output_dir") or spec_from(config, flags).output_dir)
        if (output_dir / SWEEP_FILE).exists() or not config:
            return load_jobs(output_dir)
    spec = spec_from(config, flags)
    return make_jobs(spec, resolve_rows(spec))


def delete_incomplete(jobs: Sequence[Job], ask: bool) -> int:
    """Remove the folders of jobs without a `done` file, also of those that are running now: they look the same."""
    print_status(jobs)
    to_delete = [job for job in jobs if job.state == Job.INCOMPLETE]
    print(f"About to delete {len(to_delete)} jobs.", flush=True)
    if to_delete and ask and not confirmed():
        return 0
    for job in to_delete:
        shutil.rmtree(job.folder)
    print(f"Deleted {len(to_delete)} jobs!")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    flags = {name: value for name, value in vars(parser().parse_args(argv)).items() if value is not None}
    command, config, skip = flags.pop("command"), flags.pop("config", None), flags.pop("skip_confirmation")
    flags.pop("seed", None)
    if command == "launch":
        spec = spec_from(config, flags)
        quickstart = not (config or flags)
        return launch(spec, ask=not (skip or quickstart or spec.launcher == "dummy"))
    flags.pop("launcher", None)
    jobs = existing_jobs(config, flags)
    if command == "delete_incomplete":
        return delete_incomplete(jobs, ask=not skip)
    print_status(jobs)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children must not outlive their launcher
    sys.exit(run(main))
