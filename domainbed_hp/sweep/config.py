"""The settings of a sweep, from a sweep file and flags."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from domainbed_hp import registry
from domainbed_hp.registry import UsageError
from domainbed_hp.sweep.jobs import WHERE, Job
from domainbed_hp.sweep.spec import LAUNCHER_OPTIONS, Row, SweepSpec, options_of


def read_sweep_file(path: str | None) -> dict[str, Any]:
    """The contents of a sweep file; without a path the packaged quickstart."""
    try:
        file = Path(path) if path else resources.files("domainbed_hp") / "sweep" / "quickstart.toml"
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


def parse_test_envs(texts: Sequence[str]) -> list[list[int]]:
    try:
        return [[int(number) for number in text.split(",")] for text in texts]
    except ValueError as error:
        got = " ".join(texts)
        raise UsageError(f"--test_envs {got}: expected numbers, e.g. 0 2, or 0,2 to leave out both at once") from error


def parse_slurm(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise UsageError(f"--slurm {' '.join(texts)}: expected KEY=VALUE ..., e.g. partition=gpu mem=16GB")
    return {key: value for key, _, value in pairs}


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
    if "test_envs" in others:
        others["test_envs"] = parse_test_envs(others["test_envs"])
    if "slurm" in others:
        others["slurm"] = parse_slurm(others["slurm"])
        if isinstance(values.get("slurm"), dict):
            others["slurm"] = values["slurm"] | others["slurm"]
    if "launcher" in others:  # the file's options are for the file's launcher: what this one does not know is left out
        known = options_of(registry.load(registry.LAUNCHERS, "launcher", others["launcher"]))
        values = {name: value for name, value in values.items() if name not in LAUNCHER_OPTIONS or name in known}
    spec = SweepSpec.of(values | others, source)

    if "n_trials" in others:
        spec = replace(spec, rows=tuple(replace(row, n_trials=None) for row in spec.rows))
    if algorithms:
        new = [Row(name) for name in algorithms if name not in {row.algorithm for row in spec.rows}]
        spec = replace(spec, rows=(*(row for row in spec.rows if row.algorithm in algorithms), *new))
    return override(spec, parse_hparams(flags["hparams"])) if "hparams" in flags else spec


def read_jobs(path: str, flags: dict[str, Any]) -> list[tuple[SweepSpec, list[Job]]]:
    """The jobs of a file that `collect_results --missing` wrote, by sweep; the spec checks and launches them.

    `flags` may say where jobs run and where data lie, nothing that would make other jobs of them.
    """
    for name in flags:
        if name not in (*WHERE, "launcher", *LAUNCHER_OPTIONS):
            raise UsageError(f"--{name} with --jobs: what the jobs are stands in {path}")
    where = {name: flags[name] for name in WHERE if name in flags}
    try:
        entries = [(Path(job["output_dir"]), dict(job["args"])) for job in json.loads(Path(path).read_text())["jobs"]]
        jobs = [Job.under(folder, args | where) for folder, args in entries]
        rows = [row_of(job) for job in jobs]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        expected = "a file of jobs, as collect_results --missing writes it"
        raise UsageError(f"--jobs {path}: expected {expected}; got {error!r}") from error
    if not jobs:
        raise UsageError(f"--jobs {path}: no jobs in it; nothing was missing")
    values = {**flags, "slurm": parse_slurm(flags["slurm"])} if "slurm" in flags else flags
    found = []
    for folder in dict.fromkeys(job.folder.parent for job in jobs):
        mine = [job for job in jobs if job.folder.parent == folder]
        of_mine = [row for row, job in zip(rows, jobs, strict=True) if job.folder.parent == folder]
        datasets = list(dict.fromkeys(job.args["dataset"] for job in mine))
        imports = list(dict.fromkeys(module for job in mine for module in job.args.get("import", [])))
        data_dir = next((job.args["data_dir"] for job in mine if job.args.get("data_dir")), "")
        told = {"data_dir": data_dir, "output_dir": str(folder), "datasets": datasets, "imports": imports}
        spec = SweepSpec.of({**told, **values, "rows": [{"algorithm": of_mine[0].algorithm}]}, f"--jobs {path}")
        different = [row for i, row in enumerate(of_mine) if row not in of_mine[:i]]
        found.append((replace(spec, rows=tuple(different)), mine))
    return found


def row_of(job: Job) -> Row:
    hparams = parse_hparams(job.args.get("hparams") or "{}")
    return Row(job.args["algorithm"], job.args.get("label") or "", hparams, job.args.get("steps"))


def override(spec: SweepSpec, hparams: dict[str, Any]) -> SweepSpec:
    """`hparams` for every algorithm that knows the name, also where a row or an algorithm sets its own value."""

    def won(table: dict[str, Any]) -> dict[str, Any]:
        return table | {name: value for name, value in hparams.items() if name in table}

    fixed = {name: won(value) if isinstance(value, dict) else value for name, value in spec.hparams.items()}
    rows = tuple(replace(row, hparams=won(row.hparams)) for row in spec.rows)
    return replace(spec, rows=rows, hparams=fixed | hparams)
