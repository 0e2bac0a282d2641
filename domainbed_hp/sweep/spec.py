"""A sweep: runs described once, made into jobs whose state is on disk.

No torch here: `checking.resolve_rows` needs it, because hparams stand beside the algorithms that read them;
`jobs.listed` keeps its answer in `<output_dir>/sweep.json`, so that the state of a sweep is told without torch.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from itertools import combinations, product
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from domainbed_hp import __version__, registry
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import seed_hash
from domainbed_hp.sweep.jobs import Job

CHOICES = {
    "task": ("domain_generalization", "domain_adaptation"),
    "precision": ("fp32", "bf16"),
    "compile": ("auto", "on", "off"),
    "features": ("cached", "encode"),
    "eval": ("full", "fast"),
    "save": ("trained", "full"),
    "keep": ("last", "best"),
}
"""Values of those arguments that have few."""
LAUNCHER_OPTIONS = ("max_parallel", "jobs_per_gpu", "slurm")


@dataclass(frozen=True)
class Row:
    """One row of a table: an algorithm and what is set for it. An ablation is a row, not a class."""

    algorithm: str
    label: str = ""
    hparams: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    n_trials: int | None = None
    """In place of the sweep's."""

    @property
    def name(self) -> str:
        return self.label or self.algorithm


@dataclass(frozen=True)
class SweepSpec:
    """What a sweep runs. The fields are the keys of a sweep file; defaults are DomainBed's."""

    output_dir: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    data_dir: str = ""
    task: str = "domain_generalization"
    n_trials: int = 3
    n_trials_from: int = 0
    n_hparams_from: int = 0
    n_hparams: int = 20
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    single_test_envs: bool = False
    test_envs: tuple[tuple[int, ...], ...] = ()
    """Empty: every single environment and, unless `single_test_envs`, every pair."""
    steps: int | None = None
    checkpoint_freq: int | None = None
    eval: str | None = None
    eval_images: int | None = None
    precision: str | None = None
    compile: str | None = None
    device: str | None = None
    features: str | None = None
    save: str | None = None
    keep: str | None = None
    num_workers: int | None = None
    skip_model_save: bool = False
    imports: tuple[str, ...] = ()
    """Modules with algorithms and data sets of the user's own, `--import`."""
    launcher: str = "local"
    max_parallel: int | None = None
    jobs_per_gpu: int | None = None
    slurm: dict[str, Any] = field(default_factory=dict)
    """Options of sbatch: partition, time, mem, ..."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """`name: value` for every algorithm that knows the name, and `algorithm: {name: value}` for one alone."""

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> "SweepSpec":
        """A checked spec from the contents of a sweep file; `source` is named in errors."""
        rows = values.get("rows", ())
        if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
            raise UsageError(f"{source}: `rows` are tables: write [[rows]] above each")
        rows = tuple(Row(**_typed(Row, row, f"[[rows]] of {source}")) for row in rows)
        spec = cls(**_typed(cls, {**values, "rows": rows}, source))
        if not (spec.output_dir and spec.datasets and spec.rows):
            raise UsageError(f"{source}: output_dir, datasets and rows must not be empty")
        if spec.n_trials < 1 or spec.n_trials_from < 0 or not 0 <= spec.n_hparams_from < spec.n_hparams:
            seeds = f"hparams seeds from {spec.n_hparams_from} (n_hparams_from) to below {spec.n_hparams} (n_hparams)"
            trials = f"n_trials {spec.n_trials} from {spec.n_trials_from} (n_trials_from)"
            raise UsageError(f"{source}: no jobs: {trials}, {seeds}")
        counts = {name: getattr(spec, name) for name in ("steps", "checkpoint_freq", "eval_images", *LAUNCHER_OPTIONS)}
        own = [(f"{name} of {row.name}", getattr(row, name)) for row in rows for name in ("steps", "n_trials")]
        for name, value in [*counts.items(), *own]:
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{source}: {name} is {value}; it must be at least 1")
        for name, value in spec.slurm.items():
            if not isinstance(value, str | int | float):
                raise UsageError(f"{source}: slurm.{name} is {value!r}; expected a word or a number")
        if spec.task == "domain_adaptation" and not spec.uda_holdout_fraction:
            raise UsageError(f"{source}: domain_adaptation needs uda_holdout_fraction: no image would be unlabeled")
        for name, known in CHOICES.items():
            if getattr(spec, name) not in (None, *known):
                raise registry.unknown_name(f"{name} in {source}:", getattr(spec, name), known)
        names = [row.name for row in rows]
        for row in rows:
            if row.name in registry.ALGORITHMS and row.name != row.algorithm:
                raise UsageError(f"{source}: label {row.label!r} of {row.algorithm} is another algorithm's name")
            if names.count(row.name) > 1:
                raise UsageError(f"{source}: two rows are called {row.name!r}; give each a `label` of its own")
        return spec


def _typed(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`values` as arguments of the dataclass `cls`: known names, the right types, nothing missing, lists as tuples."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise registry.unknown_name(f"key of {source}:", name, hints)
        if not _matches(value, hints[name]):
            raise UsageError(f"{source}: {name} is {value!r}; expected {_wanted(hints[name])}")
    missing = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING and f.name not in values]
    if missing:
        raise UsageError(f"{source}: missing {', '.join(missing)}")
    return {name: _frozen(value) for name, value in values.items()}


def _matches(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_matches(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_matches(item, inner[0]) for item in value)
    return type(value) in ((int, float) if hint is float else (origin or hint,))


def _wanted(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return f"a list of {_wanted(inner[0])}"
    return _wanted(inner[0]) if origin is UnionType else (origin or hint).__name__


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def options_of(launcher: Callable[..., list[int]]) -> list[str]:
    """Those of `LAUNCHER_OPTIONS` that `launcher` takes."""
    parameters = inspect.signature(launcher).parameters
    every = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in LAUNCHER_OPTIONS if every or name in parameters]


def launcher_of(spec: SweepSpec) -> Callable[[list[list[str]]], list[int]]:
    """The launcher with the options that were given; `UsageError` for one that it does not know."""
    launcher = registry.load(registry.LAUNCHERS, "launcher", spec.launcher)
    given = {name: getattr(spec, name) for name in LAUNCHER_OPTIONS if getattr(spec, name)}
    for name in given:
        if name not in options_of(launcher):
            raise registry.unknown_name(f"option of launcher {spec.launcher}", name, options_of(launcher) or ["none"])
    if spec.slurm:
        given["slurm"] = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in spec.slurm.items()}
    return partial(launcher, **given)


def choose_test_envs(spec: SweepSpec, dataset: str) -> list[list[int]]:
    """The lists of test environments of one data set; by default [0], [0, 1], [0, 2], ..., [1], [1, 2], ..."""
    from domainbed_hp.datasets.open import find_spec

    count = len(find_spec(dataset, spec.data_dir).environments)
    if spec.test_envs:
        chosen = [list(envs) for envs in spec.test_envs]
    elif spec.single_test_envs:
        chosen = [[i] for i in range(count)]
    else:
        chosen = sorted([[i] for i in range(count)] + [list(pair) for pair in combinations(range(count), 2)])
    for envs in chosen:
        if not envs or len(set(envs)) < len(envs) or not set(envs) <= set(range(count)):
            raise UsageError(f"test_envs {envs}: {dataset} has the environments 0 to {count - 1}; name each once")
        if len(envs) == count:
            hint = "" if spec.test_envs else ": give --single_test_envs"
            raise UsageError(f"test_envs {envs} leave no environment of {dataset} to train on{hint}")
    return chosen


def make_jobs(spec: SweepSpec, rows: Sequence[Row]) -> list[Job]:
    """One job per trial, data set, row, test environments and hparams seed, nested in this order as in DomainBed.

    A job's seed does not depend on the row's label, hparams or steps: rows of one algorithm see the same batches.
    """
    test_envs_of = {dataset: choose_test_envs(spec, dataset) for dataset in spec.datasets}
    optional = [
        "checkpoint_freq",
        "eval",
        "eval_images",
        "precision",
        "compile",
        "device",
        "features",
        "save",
        "keep",
        "data_dir",
        "skip_model_save",
        "uda_holdout_fraction",
    ]
    most = max(row.n_trials or spec.n_trials for row in rows)
    jobs = []
    nested = product(range(most), spec.datasets, rows)
    for trial, dataset, row in (each for each in nested if each[0] < (each[2].n_trials or spec.n_trials)):
        trial_seed = spec.n_trials_from + trial
        for test_envs, hparams_seed in product(test_envs_of[dataset], range(spec.n_hparams_from, spec.n_hparams)):
            args: dict[str, Any] = {
                "dataset": dataset,
                "algorithm": row.algorithm,
                "test_envs": test_envs,
                "holdout_fraction": spec.holdout_fraction,
                "hparams_seed": hparams_seed,
                "task": spec.task,
                "trial_seed": trial_seed,
                "seed": seed_hash(dataset, row.algorithm, test_envs, hparams_seed, trial_seed),
            }
            extra = {key: getattr(spec, key) for key in optional}
            extra["steps"] = row.steps or spec.steps
            extra["hparams"] = json.dumps(row.hparams, sort_keys=True) if row.hparams else None
            extra["label"] = row.label
            extra["import"] = list(spec.imports)
            args |= {key: value for key, value in extra.items() if value}
            if spec.num_workers is not None:  # 0 is a value
                args["num_workers"] = spec.num_workers
            jobs.append(Job.under(Path(spec.output_dir), args))
    if len({job.folder for job in jobs}) < len(jobs):
        raise UsageError("the same job twice: a data set or an entry of test_envs is repeated")
    return jobs


def described(spec: SweepSpec, rows: Sequence[Row]) -> dict[str, Any]:
    """What sweep.json says of a sweep beside its jobs: for who reads a table made of them."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        kept.append({"algorithm": row.algorithm, "label": row.name, "hparams": row.hparams})
        if any(each.n_trials for each in rows):  # fewer trials than others have are then meant
            kept[-1]["n_trials"] = row.n_trials or spec.n_trials
    return {"version": __version__, "spec": asdict(spec), "rows": kept}
