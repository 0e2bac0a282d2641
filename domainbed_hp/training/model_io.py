"""A trained model on disk: what training changed, and the recipe that rebuilds the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.files import replace_atomically
from domainbed_hp.hparams_registry import DeclaredHparams
from domainbed_hp.registry import UsageError


@dataclass(frozen=True)
class Recipe:
    """Everything an algorithm is built from, its trained weights aside."""

    algorithm: str
    hparams: dict[str, Any]
    steps: int
    image_size: int
    class_names: tuple[str, ...]
    num_domains: int
    """Training environments."""


def build(recipe: Recipe) -> Algorithm:
    """The algorithm, told also its number of steps and the class names, for which DomainBed has no channel."""
    told = recipe.hparams | {"class_names": list(recipe.class_names), "steps": recipe.steps}
    shape = (3, recipe.image_size, recipe.image_size)
    hparams = DeclaredHparams(recipe.algorithm, told)
    return get_algorithm_class(recipe.algorithm)(shape, len(recipe.class_names), recipe.num_domains, hparams)


def save_model(path: Path, algorithm: Algorithm, recipe: Recipe, *, full: bool = False) -> None:
    """What training changed, or with `full` everything, as safetensors; the recipe in the header rebuilds the rest."""
    state = algorithm.state_dict() if full else algorithm.trained_state()
    with replace_atomically(path) as temporary:
        # Cloned: of tensors that share memory safetensors takes one alone.
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        save_file(tensors, temporary, metadata={"recipe": json.dumps(asdict(recipe))})


def load_model(run_dir: Path) -> tuple[Algorithm, Recipe]:
    """A trained algorithm, in evaluation mode, and its recipe."""
    path = run_dir / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no model.safetensors. Has the run ended, and without --skip_model_save?")
    with safe_open(path, "pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    algorithm = build(recipe)
    unexpected = algorithm.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise UsageError(f"{path}: has {unexpected[:3]}, which {recipe.algorithm} with its hparams does not know")
    return algorithm.eval(), recipe
