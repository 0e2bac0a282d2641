"""The description of a sweep, and the list of jobs that follows from it. No torch is imported here."""

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from itertools import combinations, product
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from domainbed_hp import __version__, registry, run_args
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.seeds import seed_hash
from domainbed_hp.sweep.jobs import Job

LAUNCHER_FLAGS: dict[str, Any] = {"max_parallel": int, "jobs_per_gpu": int, "slurm": dict[str, Any]}
"""Type of each option of the package's launchers that is a flag and a key of a sweep file."""
UNIONS = (UnionType, Union)
"""Origins of `int | None` and `Optional[int]`."""


@dataclass(frozen=True)
class Row:
    """One row of a table: an algorithm and its settings. An ablation is a row, not a class."""

    algorithm: str
    label: str = ""
    hparams: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    """Number of updates, in place of the sweep's."""
    n_trials: int | None = None
    """Number of trials, in place of the sweep's."""

    @property
    def name(self) -> str:
        return self.label or self.algorithm


@dataclass(frozen=True)
class SweepSpec:
    """The description of a sweep. Its fields are keys of a sweep file, except `run`; defaults are DomainBed's."""

    output_dir: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    n_trials: int = 3
    n_trials_from: int = 0
    n_hparams_from: int = 0
    n_hparams: int = 20
    single_test_envs: bool = False
    test_envs: tuple[tuple[int, ...], ...] = ()
    """Lists of test environments. Empty: every single one and, unless `single_test_envs`, every pair."""
    launcher: str = "local"
    launcher_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the launcher."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """`name: value` for every algorithm that has the hparam, and `algorithm: {name: value}` for one algorithm."""
    run: dict[str, Any] = field(default_factory=dict)
    """The given ones of the arguments that all runs share; each is a key of a sweep file."""

    @property
    def run_args(self) -> RunArgs:
        """The arguments that all runs share, with defaults in place of those that are not given."""
        return RunArgs.of(self.run)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Self:
        """Return the spec in the contents of a sweep file.

        Args:
            source: name of the sweep file, for messages.

        Raises:
            UsageError: an unknown key, a value of the wrong type or out of range, or no job in the sweep.
        """
        rows = values.get("rows", ())
        if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
            raise UsageError(f"{source}: expected `rows` to be tables: write [[rows]] above each")
        rows = tuple(Row(**check_types(Row, row, f"[[rows]] of {source}")) for row in rows)
        values = check_types(cls, {**values, "rows": rows}, source)
        run = {name: values.pop(name) for name in run_args.SHARED if name in values}
        run = {name: value for name, value in run.items() if value != ""}  # data_dir = "" is not given
        options = {name: values.pop(name) for name in LAUNCHER_FLAGS if name in values}
        spec = cls(**values | {"launcher_options": values.get("launcher_options", {}) | options, "run": run})
        try:
            spec.check()
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        return spec

    def check(self) -> None:
        """Raise `UsageError` for values that make no sweep."""
        if not (self.output_dir and self.datasets and self.rows):
            raise UsageError("output_dir, datasets and rows must not be empty; set all three")
        if self.n_trials < 1 or self.n_trials_from < 0 or not 0 <= self.n_hparams_from < self.n_hparams:
            seeds = f"hparams seeds from {self.n_hparams_from} (n_hparams_from) to below {self.n_hparams} (n_hparams)"
            raise UsageError(f"no jobs: n_trials {self.n_trials} from {self.n_trials_from} (n_trials_from), {seeds}")
        counts = {name: self.launcher_options.get(name) for name in LAUNCHER_FLAGS}
        counts |= {f"{name} of {row.name}": getattr(row, name) for row in self.rows for name in ("steps", "n_trials")}
        for name, value in counts.items():
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name}: got {value}, expected at least 1")
        for option, table in self.launcher_options.items():
            for name, value in table.items() if isinstance(table, dict) else ():
                if not isinstance(value, str | int | float):
                    raise UsageError(f"{option}.{name}: got {value!r}, expected a word or a number")
        args = self.run_args  # checks its values
        if args.task == "domain_adaptation" and not args.uda_holdout_fraction:
            raise UsageError("domain_adaptation needs uda_holdout_fraction above 0: else no image is unlabeled")
        names = [row.name for row in self.rows]
        for row in self.rows:
            if row.name in registry.ALGORITHMS and row.name != row.algorithm:
                raise UsageError(f"label {row.label!r} of {row.algorithm} is another algorithm's name; change it")
            if names.count(row.name) > 1:
                raise UsageError(f"two rows are called {row.name!r}; give each a `label` of its own")


def check_types(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check keys and types of a sweep file (`cls` SweepSpec) or of one of its rows (Row); return lists as tuples."""
    types = get_type_hints(cls)
    if cls is SweepSpec:
        del types["run"]
        types |= LAUNCHER_FLAGS | {name: run_args.TYPES[name] for name in run_args.SHARED}
    for name, value in values.items():
        if name not in types:
            raise registry.unknown_name(f"key of {source}:", name, types)
        if not is_of_type(value, types[name]):
            raise UsageError(f"{source}: {name} is {value!r}; expected {describe_type(types[name])}")
    missing = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING and f.name not in values]
    if missing:
        advice = f"pass --{missing[0]}" if source == "flags" else "add it to the file"
        raise UsageError(f"{source}: missing {', '.join(missing)}; {advice}")
    return {name: to_tuple(value) for name, value in values.items()}


def is_of_type(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, inspect.Parameter.empty):
        return True
    if origin in UNIONS:
        return any(is_of_type(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(is_of_type(item, inner[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    return type(value) in ((int, float) if hint is float else (hint,))  # not isinstance: True is no int here


def describe_type(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return f"a list of {describe_type(inner[0])}"
    return describe_type(inner[0]) if origin in UNIONS else str((origin or hint).__name__)


def to_tuple(value: Any) -> Any:
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


def list_launcher_options(launcher: Callable[..., list[int]]) -> dict[str, Any] | None:
    """Return the type of each parameter of a launcher after the commands; None if it takes any option."""
    parameters = list(inspect.signature(launcher, eval_str=True).parameters.values())[1:]
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name: parameter.annotation for parameter in parameters}


def load_launcher(spec: SweepSpec) -> partial[list[int]]:
    """Return the spec's launcher with its options; `UsageError` for an unknown option or a wrong type."""
    launcher = registry.load(registry.LAUNCHERS, "launcher", spec.launcher)
    known, options = list_launcher_options(launcher), dict(spec.launcher_options)
    for name, value in options.items():
        if known is not None and name not in known:
            raise registry.unknown_name(f"option of launcher {spec.launcher}", name, known or ["none"])
        options[name] = read_option(name, value, Any if known is None else known[name])
    return partial(launcher, **options)


def read_option(name: str, value: Any, hint: Any) -> Any:
    """Return the value of a launcher's option in its annotated type; text of the command line is read as JSON."""
    if isinstance(value, dict):  # options of sbatch, which are text
        return {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in value.items()}
    if isinstance(value, str) and not is_of_type(value, hint):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not is_of_type(value, hint):
        raise UsageError(f"launcher option {name}: got {value!r}, expected {describe_type(hint)}")
    return value


def choose_test_envs(spec: SweepSpec, dataset: str) -> list[list[int]]:
    """Return the lists of test environments of one data set; by default [0], [0, 1], [0, 2], ..., [1], [1, 2], ..."""
    from domainbed_hp.datasets.open import find_spec

    count = len(find_spec(dataset, spec.run_args.data_dir).environments)
    if spec.test_envs:
        chosen = [list(envs) for envs in spec.test_envs]
    elif spec.single_test_envs:
        chosen = [[i] for i in range(count)]
    else:
        chosen = sorted([[i] for i in range(count)] + [list(pair) for pair in combinations(range(count), 2)])
    for envs in chosen:
        if not envs or len(set(envs)) < len(envs) or not set(envs) <= set(range(count)):
            raise UsageError(f"test_envs {envs}: {dataset} has the environments 0 to {count - 1}; list each once")
        if len(envs) == count:
            hint = "" if spec.test_envs else ": give --single_test_envs"
            raise UsageError(f"test_envs {envs} leave no environment of {dataset} to train on{hint}")
    return chosen


def make_jobs(spec: SweepSpec, rows: Sequence[Row]) -> list[Job]:
    """Return one job per trial, data set, row, test environments and hparams seed, nested in this order of DomainBed.

    A job's seed does not depend on the row's label, hparams or steps: rows of one algorithm see the same batches.
    """
    test_envs_of = {dataset: choose_test_envs(spec, dataset) for dataset in spec.datasets}
    # What is empty by default and empty here is left out, as DomainBed does; 0 threads are not empty.
    shared = {name: value for name, value in spec.run.items() if value or value != run_args.SHARED[name]}
    shared = {"holdout_fraction": spec.run_args.holdout_fraction, "task": spec.run_args.task} | shared
    jobs = []
    trials = max(row.n_trials or spec.n_trials for row in rows)
    for trial, dataset, row in product(range(trials), spec.datasets, rows):
        if trial >= (row.n_trials or spec.n_trials):
            continue
        trial_seed = spec.n_trials_from + trial
        hparams = json.dumps(row.hparams, sort_keys=True) if row.hparams else ""
        settings = {"label": row.label, "hparams": hparams, "steps": row.steps}
        row_args = shared | {name: value for name, value in settings.items() if value}
        for test_envs, hparams_seed in product(test_envs_of[dataset], range(spec.n_hparams_from, spec.n_hparams)):
            args = row_args | {
                "dataset": dataset,
                "algorithm": row.algorithm,
                "test_envs": test_envs,
                "hparams_seed": hparams_seed,
                "trial_seed": trial_seed,
                "seed": seed_hash(dataset, row.algorithm, test_envs, hparams_seed, trial_seed),
            }
            jobs.append(Job.create(Path(spec.output_dir), run_args.name_flags(args)))
    if len({job.folder for job in jobs}) < len(jobs):
        raise UsageError("got the same job twice: remove the repeated data set or entry of test_envs")
    return jobs


def describe_sweep(spec: SweepSpec, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the description of a sweep for its sweep.json, from which reports read the rows and the settings."""
    described = []
    for row in rows:
        entry: dict[str, Any] = {"algorithm": row.algorithm, "label": row.name, "hparams": row.hparams}
        if any(other.n_trials for other in rows):  # tells reports that no trials of this row are missing
            entry["n_trials"] = row.n_trials or spec.n_trials
        described.append(entry)
    values = asdict(spec)
    return {"version": __version__, "spec": values.pop("run") | values, "rows": described}
