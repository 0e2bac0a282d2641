"""Algorithms, text sides and data sets of a user's own, without a fork: `--import my_pkg.my_module`."""

import importlib
import inspect
from types import ModuleType

from domainbed_hp.algorithms.base import Algorithm
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.prompts.base import TextSide
from domainbed_hp.registry import ALGORITHMS, DATASETS, PROMPTS, UsageError


def import_plugin(module: str) -> list[str]:
    """Register what `module` defines: algorithms and text sides under their class names, data sets by `name`."""
    try:
        plugin = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--import {module}: {error}. It is imported as `import {module}`, "
            "from the current folder or an installed package."
        ) from error
    found = [
        (ALGORITHMS, {name: name for name in subclasses(plugin, Algorithm)}),
        (PROMPTS, {name: name for name in subclasses(plugin, TextSide)}),
        (DATASETS, {value.name: key for key, value in vars(plugin).items() if isinstance(value, DatasetSpec)}),
    ]
    names = [name for _, own in found for name in own]
    if not names:
        raise UsageError(
            f"--import {module}: it defines no subclass of domainbed_hp.algorithms.base.Algorithm or of "
            "domainbed_hp.prompts.base.TextSide, and no domainbed_hp.datasets.spec.DatasetSpec"
        )
    for table, own in found:
        table.update({name: f"{module}:{key}" for name, key in own.items()})
    return names


def subclasses(plugin: ModuleType, base: type) -> list[str]:
    """Names of those that the module defines itself; what it imports is others'."""
    own = {k: v for k, v in vars(plugin).items() if inspect.isclass(v) and v.__module__ == plugin.__name__}
    return [name for name, value in own.items() if issubclass(value, base)]
