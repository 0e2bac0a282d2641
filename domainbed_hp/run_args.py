"""The arguments of a run, each one described once: a field of `RunArgs` has its default, type, choices, help and role.

The rest follows from the fields: the flags of `train` and `sweep`, the keys of a sweep file, the arguments and names of
jobs, and the protocol that the runs of one row share. This module imports no torch.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from domainbed_hp.registry import ALGORITHMS, DATASETS, UsageError, unknown_name

GROUPS = TRAINING, EVALUATION, OUTPUT, SPEED = "what to train", "evaluation", "output", "speed"
"""Groups of flags in `--help`, in their order there."""
EXAMPLE = """'{"lr": 1e-4}'"""


def flag(
    default: Any,
    help: str,
    *,
    role: Literal["identity", "where", "protocol"] = "identity",
    group: str = TRAINING,
    choices: tuple[str, ...] = (),
    at_least: int | None = None,
    metavar: str | None = None,
    name: str | None = None,
    per_job: bool = False,
) -> Any:
    """Return a dataclass field that describes one flag.

    Args:
        role: "identity": another value makes another job. "protocol": it also makes another row of a table. "where":
            the value says only where or how fast the run computes.
        name: name of the flag, where the field cannot have it.
        per_job: True if a sweep sets the value for each job, so that its runs cannot share one.
    """
    metadata = {"help": help, "role": role, "group": group, "choices": choices, "at_least": at_least}
    return field(default=default, metadata=metadata | {"metavar": metavar, "name": name, "per_job": per_job})


@dataclass(frozen=True)
class RunArgs:
    """The arguments of a run; every record holds them. Those of DomainBed's train.py have the same meaning here.

    Raises:
        UsageError: a value is not among the choices, or too small.
    """

    output_dir: str = flag("train_output", "folder of the run", role="where", group=OUTPUT, metavar="DIR", per_job=True)
    data_dir: str | None = flag(
        None, "folder that holds the data sets' folders: PACS, VLCS, office_home, ...", role="where", metavar="DIR"
    )
    # DEVIATION: DomainBed's defaults of dataset and algorithm are RotatedMNIST and ERM. All others are the same.
    dataset: str = flag(
        "ShapesDG",
        f"data set: {', '.join(DATASETS)}; or folder:PATH, with images in PATH/<environment>/<class>/",
        metavar="NAME",
        per_job=True,
    )
    algorithm: str = flag(
        "HeadPurification", f"algorithm: {', '.join(ALGORITHMS)}", role="protocol", metavar="NAME", per_job=True
    )
    task: str = flag(
        "domain_generalization",
        "domain_adaptation: the algorithm also sees unlabeled images of the test environments (--uda_holdout_fraction)",
        role="protocol",
        choices=("domain_generalization", "domain_adaptation"),
    )
    hparams: str | None = flag(
        None, f"hyperparameters to set, a JSON object such as {EXAMPLE}", metavar="JSON", per_job=True
    )
    hparams_seed: int = flag(0, "0: default hyperparameters; n > 0: the n-th random draw", per_job=True)
    trial_seed: int = flag(0, "seed of the split into training and validation images and of random draws", per_job=True)
    seed: int = flag(0, "seed of the initial weights and of the minibatches", per_job=True)
    steps: int | None = flag(None, "number of training steps (default: the data set's)", role="protocol", at_least=1)
    test_envs: tuple[int, ...] = flag(
        (0,), "indices of the environments that are held out of training, for testing", metavar="ENV", per_job=True
    )
    uda_holdout_fraction: float = flag(
        0.0,
        "domain_adaptation: fraction of each test environment's split `in` that the algorithm sees, without labels",
        role="protocol",
    )
    imports: tuple[str, ...] = flag(
        (),
        "names of your own Python modules, which define algorithms, text sides, data sets, ...",
        metavar="MODULE",
        name="import",
    )
    checkpoint_freq: int | None = flag(
        None, "number of steps from one evaluation to the next (default: the data set's)", group=EVALUATION, at_least=1
    )
    holdout_fraction: float = flag(
        0.2, "fraction of each environment's images that is held out for validation", role="protocol", group=EVALUATION
    )
    eval_images: int | None = flag(
        None,
        "largest number of images of each split to evaluate on (default: all)",
        role="protocol",
        group=EVALUATION,
        at_least=1,
    )
    eval: str = flag(
        "full",
        "full: evaluate all images; fast: leave out those that the run trains on, which no selection rule needs",
        group=EVALUATION,
        choices=("full", "fast"),
    )
    skip_model_save: bool = flag(False, "write no model file", group=OUTPUT)
    save_model_every_checkpoint: bool = flag(False, "also write a model file at every evaluation", group=OUTPUT)
    save: str = flag(
        "trained",
        "weights in a model file: trained: those that training changed; full: all",
        group=OUTPUT,
        choices=("trained", "full"),
    )
    keep: str = flag(
        "last",
        "last: write the model of the last step; best: also the one with the highest validation accuracy",
        group=OUTPUT,
        choices=("last", "best"),
    )
    label: str | None = flag(
        None, "name of the run's row in tables (default: the algorithm)", group=OUTPUT, metavar="TEXT", per_job=True
    )
    device: str | None = flag(
        None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)", role="where", group=SPEED, metavar="DEVICE"
    )
    precision: str = flag(
        "fp32",
        "number format of the computation: fp32, or bf16 in automatic mixed precision",
        role="protocol",
        group=SPEED,
        choices=("fp32", "bf16"),
    )
    compile: str = flag(
        "auto",
        "auto: on a GPU, run steps as CUDA graphs, and compile the model in long runs; on: always compile the model; "
        "off: do neither",
        role="where",
        group=SPEED,
        choices=("auto", "on", "off"),
    )
    num_workers: int | None = flag(
        None, "threads that load images (default: up to 8 with a GPU, 0 without)", role="where", group=SPEED, at_least=0
    )
    features: str = flag(
        "cached",
        "features of an image encoder that does not train: cached: compute them once and store them; encode: compute "
        "them in every step",
        role="where",
        group=SPEED,
        choices=("cached", "encode"),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices, at_least = getattr(self, f.name), f.metadata["choices"], f.metadata["at_least"]
            if choices and value not in choices:
                raise unknown_name(f.name, value, choices)
            if at_least is not None and value is not None and value < at_least:
                raise UsageError(f"{f.name}: got {value}, expected at least {at_least}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the arguments that a command line, a sweep file or a record holds; missing ones have their default.

        Lists become tuples. `UsageError` for a name that is no argument.
        """
        values = {name: value for name, value in values.items() if (name, value) not in REMOVED.items()}
        for name in values:
            if name not in TYPES:
                raise unknown_name("argument of a run", name, TYPES)
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**frozen)


TYPES: dict[str, Any] = get_type_hints(RunArgs)
"""Type of each argument."""
FLAG_NAMES = {f.name: f.metadata["name"] or f.name for f in fields(RunArgs)}
"""Name of each argument's flag, and of the argument in a job."""
SHARED = {f.name: f.default for f in fields(RunArgs) if not f.metadata["per_job"]}
"""Default of each argument that all runs of a sweep share, a key of a sweep file."""
# DEVIATION: DomainBed names a job after its data_dir, too, so that moving the data orphans every finished job.
WHERE = tuple(f.name for f in fields(RunArgs) if f.metadata["role"] == "where")
"""Arguments that the name of a job leaves out."""
REMOVED = {"loader": "batched"}
"""Arguments that only earlier versions wrote, with the value that all runs have now."""
PROTOCOL = {f.name: f.default for f in fields(RunArgs) if f.metadata["role"] == "protocol"} | REMOVED
"""Default of each argument that the runs of one row of a table share."""


def find_differences(before: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments, with both values, by which two records are of different runs.

    An argument that a record lacks is newer than the record and had its default.
    """
    # DomainBed's records lack most arguments, and are of other runs.
    defaults = {f.name: f.default for f in fields(RunArgs)} | REMOVED if "imports" in before else {}
    there, here = (
        {name: list(v) if isinstance(v, tuple) else v for name, v in {**defaults, **values}.items()}
        for values in (before, args)
    )
    names = [name for name in there | here if name not in WHERE and there.get(name) != here.get(name)]
    return {name: (there.get(name), here.get(name)) for name in names}


def parse_hparams(text: str | None) -> dict[str, Any]:
    """Return the hyperparameters in `--hparams`; `UsageError` unless it is a JSON object of names and values."""
    expected = f"--hparams: got {text!r}, expected a JSON object of names and values, such as {EXAMPLE}"
    try:
        hparams = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"{expected}; this is not valid JSON: {error}") from error
    if not isinstance(hparams, dict) or any(isinstance(value, dict) for value in hparams.values()):
        raise UsageError(expected)
    return hparams


def name_flags(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments under the names of their flags, as a job has them, with lists in place of tuples."""
    return {FLAG_NAMES.get(name, name): list(v) if isinstance(v, tuple) else v for name, v in args.items()}


def add_flags(parser: argparse.ArgumentParser, *, of_sweep: bool = False) -> None:
    """Add the flags of a run to a parser, in groups.

    Those of a sweep are the ones that its runs share. Their default is None, which leaves the value of the sweep file.
    """
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for f in fields(RunArgs):
        if of_sweep and f.name not in SHARED:
            continue
        options: dict[str, Any] = {"dest": f.name, "default": None if of_sweep else f.default}
        text, kind = f.metadata["help"], find_item_type(TYPES[f.name])
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "choices": f.metadata["choices"] or None}
            options["metavar"] = f.metadata["metavar"] or {int: "N", float: "X"}.get(kind)
            if get_origin(TYPES[f.name]) is tuple:
                options["nargs"] = "+"
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            text += "" if shown in (None, "") else f" (default: {shown})"
        groups[f.metadata["group"]].add_argument(f"--{FLAG_NAMES[f.name]}", help=text, **options)


def find_item_type(hint: Any) -> type:
    """Return int for `int`, for `int | None` and for `tuple[int, ...]`."""
    kinds = [kind for kind in get_args(hint) if kind not in (NoneType, Ellipsis)]
    kind: type = kinds[0] if kinds else hint
    return kind
