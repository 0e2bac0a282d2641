"""Build an algorithm from its specification; save and load models, which are a specification and weights."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.files import replace_atomically
from domainbed_hp.hparams_registry import DeclaredHparams
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import MODEL


@dataclass(frozen=True)
class ModelSpec:
    """Everything that an algorithm is built from, except its trained weights."""

    algorithm: str
    hparams: dict[str, Any]
    steps: int
    image_size: int
    class_names: tuple[str, ...]
    num_domains: int
    """Number of training environments."""


def build_algorithm(spec: ModelSpec, seed: int | None = None) -> Algorithm:
    """Build an algorithm on the CPU, with initial weights drawn by `seed`, or without it from the global generators.

    Its hparams also hold `class_names` and `steps`, for which DomainBed's constructor has no argument.
    """
    if seed is not None:
        seed_everything(seed)
    values = spec.hparams | {"class_names": list(spec.class_names), "steps": spec.steps}
    hparams = DeclaredHparams(spec.algorithm, values)
    shape = (3, spec.image_size, spec.image_size)
    return get_algorithm_class(spec.algorithm)(shape, len(spec.class_names), spec.num_domains, hparams)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_model(path: Path, algorithm: Algorithm, spec: ModelSpec, *, full: bool = False) -> None:
    """Write the weights that training changed, or with `full` all weights, as safetensors with `spec` in the header."""
    state = algorithm.state_dict() if full else algorithm.trained_state()
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary, metadata={"recipe": json.dumps(asdict(spec))})


def load_model(run_dir: Path) -> tuple[Algorithm, ModelSpec]:
    """Return the trained algorithm of a finished run, in evaluation mode, and its specification.

    With clip_pretrained=random, the frozen weights are those of the run only after `train --save full`.
    """
    path = run_dir / MODEL
    if not path.is_file():
        raise UsageError(f"{run_dir}: no {MODEL} there; expected a finished run without --skip_model_save")
    with safe_open(path, "pt") as file:
        spec = ModelSpec(**json.loads(file.metadata()["recipe"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    algorithm = build_algorithm(spec)
    if unexpected := algorithm.load_state_dict(state, strict=False).unexpected_keys:
        raise UsageError(f"{path}: tensors {unexpected[:3]} do not exist in {spec.algorithm} with the file's hparams")
    if missing := sorted(algorithm.trained_state().keys() - state.keys()):
        advice = "load the file with the code that wrote it"
        raise UsageError(f"{path}: got no tensors {missing[:3]}, which {spec.algorithm} trains: {advice}")
    return algorithm.eval(), spec
