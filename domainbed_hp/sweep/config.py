"""Read the description of a sweep from a sweep file and flags."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from domainbed_hp import registry, run_args
from domainbed_hp.plugins import import_plugins
from domainbed_hp.registry import UsageError
from domainbed_hp.sweep.jobs import Job
from domainbed_hp.sweep.spec import LAUNCHER_FLAGS, Row, SweepSpec, list_launcher_options


def read_sweep_file(path: str | None) -> dict[str, Any]:
    """Return the contents of a sweep file, or of the packaged quickstart if no path is given."""
    try:
        file = Path(path) if path else resources.files("domainbed_hp") / "sweep" / "quickstart.toml"
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error


def parse_test_envs(texts: Sequence[str]) -> list[list[int]]:
    try:
        return [[int(number) for number in text.split(",")] for text in texts]
    except ValueError as error:
        got = " ".join(texts)
        raise UsageError(f"--test_envs {got}: expected numbers, e.g. 0 2, or 0,2 to leave out both at once") from error


def parse_pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if not all(key and equals for key, equals, _ in pairs):
        example = "partition=gpu mem=16GB" if flag == "slurm" else "max_parallel=4"
        raise UsageError(f"--{flag} {' '.join(texts)}: expected KEY=VALUE ..., e.g. {example}")
    return {key: value for key, _, value in pairs}


def parse_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags as a sweep file would hold them, without `algorithms` and `hparams`; `spec_from` applies these."""
    values = {name: value for name, value in flags.items() if name not in ("algorithms", "hparams")}
    values |= {name: parse_pairs(name, values[name]) for name in ("slurm", "launcher_options") if name in values}
    return values | ({"test_envs": parse_test_envs(values["test_envs"])} if "test_envs" in values else {})


def spec_from(config: str | None, flags: Mapping[str, Any]) -> SweepSpec:
    """Return the sweep of a sweep file and flags, which win, or the quickstart if there are neither."""
    source = f"--config {config}" if config else "flags" if flags else "quickstart"
    algorithms = flags.get("algorithms") or ([] if config or not flags else list(registry.ALGORITHMS))
    if config or not flags:
        values = read_sweep_file(config)
    else:
        datasets = [name for name in registry.DATASETS if not name.startswith("Debug")]
        values = {"datasets": datasets, "rows": [{"algorithm": name} for name in algorithms]}
    if "single_test_envs" in flags:
        values.pop("test_envs", None)
    given = parse_flags(flags)
    if "launcher" in given:
        values = drop_unknown_options(values, given["launcher"], given.get("imports", values.get("imports", [])))
    for name in ("slurm", "launcher_options"):
        if name in given and isinstance(values.get(name), dict):
            given[name] = values[name] | given[name]
    spec = SweepSpec.of(values | given, source)

    if "n_trials" in given:
        spec = replace(spec, rows=tuple(replace(row, n_trials=None) for row in spec.rows))
    if algorithms:
        new = [Row(name) for name in algorithms if name not in {row.algorithm for row in spec.rows}]
        spec = replace(spec, rows=(*(row for row in spec.rows if row.algorithm in algorithms), *new))
    return override_hparams(spec, run_args.parse_hparams(flags["hparams"])) if "hparams" in flags else spec


def drop_unknown_options(values: dict[str, Any], launcher: str, imports: Any) -> dict[str, Any]:
    """Return the contents of a sweep file without the options that `launcher`, named by a flag, does not know."""
    import_plugins(imports if isinstance(imports, list) else [])  # the launcher may be the user's
    known = list_launcher_options(registry.load(registry.LAUNCHERS, "launcher", launcher))
    if known is None:
        return values
    if isinstance(options := values.get("launcher_options"), dict):
        values = values | {"launcher_options": {name: value for name, value in options.items() if name in known}}
    return {name: value for name, value in values.items() if name not in LAUNCHER_FLAGS or name in known}


def read_jobs(path: str, flags: Mapping[str, Any]) -> list[tuple[SweepSpec, list[Job]]]:
    """Return the jobs in a file of `collect_results --missing` by sweep, with a spec to launch them.

    `flags` may say where jobs run and where data lie. `UsageError` for flags that would make other jobs.
    """
    where = {name: flags[name] for name in run_args.SHARED if name in run_args.WHERE and name in flags}
    for name in flags:
        if name not in (*where, "launcher", "launcher_options", *LAUNCHER_FLAGS):
            flag = run_args.FLAG_NAMES.get(name, name)
            raise UsageError(f"--{flag} with --jobs: the jobs in {path} cannot be changed; leave out --{flag}")
    try:
        entries = [(Path(job["output_dir"]), dict(job["args"])) for job in json.loads(Path(path).read_text())["jobs"]]
        jobs = [Job.create(folder, args | where) for folder, args in entries]
        rows = {job.folder: make_row(job) for job in jobs}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        expected = "a file of jobs, as collect_results --missing writes it"
        raise UsageError(f"--jobs {path}: expected {expected}; got {error!r}") from error
    if not jobs:
        raise UsageError(f"--jobs {path}: no jobs in it; nothing was missing")
    known = run_args.FLAG_NAMES.values()
    if strange := [name for job in jobs for name in job.args if name not in known]:
        raise registry.unknown_name(f"argument of train in {path}:", strange[0], known)
    sweeps = []
    for folder in dict.fromkeys(job.folder.parent for job in jobs):
        part = [job for job in jobs if job.folder.parent == folder]
        values = {
            "output_dir": str(folder),
            "datasets": list(dict.fromkeys(job.args["dataset"] for job in part)),
            "imports": list(dict.fromkeys(module for job in part for module in job.args.get("import", []))),
            "data_dir": next((job.args["data_dir"] for job in part if job.args.get("data_dir")), ""),
            "rows": [{"algorithm": part[0].args["algorithm"]}],
        }
        spec = SweepSpec.of(values | parse_flags(flags), f"--jobs {path}")
        different: list[Row] = []
        for job in part:
            if rows[job.folder] not in different:
                different.append(rows[job.folder])
        sweeps.append((replace(spec, rows=tuple(different)), part))
    return sweeps


def make_row(job: Job) -> Row:
    hparams = run_args.parse_hparams(job.args.get("hparams"))
    return Row(job.args["algorithm"], job.args.get("label") or "", hparams, job.args.get("steps"))


def override_hparams(spec: SweepSpec, hparams: dict[str, Any]) -> SweepSpec:
    """Return `spec` with `hparams` for every algorithm that has them, in place of those of rows and algorithms."""

    def replace_values(table: dict[str, Any]) -> dict[str, Any]:
        return table | {name: value for name, value in hparams.items() if name in table}

    fixed = {name: replace_values(value) if isinstance(value, dict) else value for name, value in spec.hparams.items()}
    rows = tuple(replace(row, hparams=replace_values(row.hparams)) for row in spec.rows)
    return replace(spec, rows=rows, hparams=fixed | hparams)
