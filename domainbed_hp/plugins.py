"""Algorithms and data sets of a user's own, without a fork: `--import my_pkg.my_module`."""

import importlib
import inspect

from domainbed_hp.algorithms.base import Algorithm
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import ALGORITHMS, DATASETS, UsageError


def import_plugin(module: str) -> list[str]:
    """Register what `module` defines: each `Algorithm` under its class name, each `DatasetSpec` under its `name`."""
    try:
        plugin = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--import {module}: {error}. It is imported as `import {module}`, "
            "from the current folder or an installed package."
        ) from error
    defined = vars(plugin).items()
    algorithms = {
        key: key
        for key, value in defined
        if inspect.isclass(value) and issubclass(value, Algorithm) and value.__module__ == plugin.__name__
    }
    datasets = {value.name: key for key, value in defined if isinstance(value, DatasetSpec)}
    if not algorithms and not datasets:
        raise UsageError(
            f"--import {module}: it defines no subclass of domainbed_hp.algorithms.base.Algorithm "
            "and no domainbed_hp.datasets.spec.DatasetSpec"
        )
    ALGORITHMS.update({name: f"{module}:{key}" for name, key in algorithms.items()})
    DATASETS.update({name: f"{module}:{key}" for name, key in datasets.items()})
    return [*algorithms, *datasets]
