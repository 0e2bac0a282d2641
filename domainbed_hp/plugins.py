"""Register the plugins in a module of the user, for `--import my_package.my_module`.

Subclasses of `Algorithm`, `TextSide`, `WeightAverage` and `SAM` are registered under their class names, subclasses of
`SelectionMethod` under their `key`, a `DatasetSpec` under its `name`, and launchers under the keys of a dictionary
`LAUNCHERS = {"my_cluster": launch}`, where `launch(commands: list[list[str]], ...) -> list[int]` returns exit codes.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

from domainbed_hp import registry
from domainbed_hp.registry import UsageError

CLASSES: list[tuple[dict[str, Any], str, str, str]] = [
    (registry.ALGORITHMS, "domainbed_hp.algorithms.base", "Algorithm", "__name__"),
    (registry.PROMPTS, "domainbed_hp.prompts.base", "TextSide", "__name__"),
    (registry.WEIGHT_AVERAGES, "domainbed_hp.training.weight_averaging", "WeightAverage", "__name__"),
    (registry.SHARPNESS, "domainbed_hp.training.sharpness", "SAM", "__name__"),
    (registry.SELECTION_RULES, "domainbed_hp.model_selection", "SelectionMethod", "key"),
]
"""Table, module and name of the base class, and the attribute of a subclass that is its name in the table."""


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules of the user and register their plugins."""
    for module in modules:
        import_plugin(module)


def import_plugin(module: str) -> list[str]:
    """Import one module of the user, register its plugins, and return their names; `UsageError` if there are none."""
    try:
        plugin = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--import {module}: {error}. It is imported as `import {module}`, "
            "from the current folder or an installed package."
        ) from error
    own = [value for value in vars(plugin).values() if inspect.isclass(value) and value.__module__ == module]
    entries: list[tuple[dict[str, Any], str, Any]] = []
    for table, base_module, base_name, attribute in CLASSES:
        # A base class that is not imported has no subclasses: a selection rule alone does not load torch.
        base = getattr(sys.modules.get(base_module), base_name, None)
        for cls in own:
            if attribute == "key" and base and issubclass(cls, base) and "key" not in vars(cls):
                raise UsageError(f'--import {module}: {cls.__name__} has no key. Add one, e.g. key = "my_rule"')
        entries += [(table, getattr(cls, attribute), cls) for cls in own if base and issubclass(cls, base)]
    spec = getattr(sys.modules.get("domainbed_hp.datasets.spec"), "DatasetSpec", ())
    entries += [(registry.DATASETS, v.name, v) for v in vars(plugin).values() if isinstance(v, spec)]
    entries += [(registry.LAUNCHERS, name, launch) for name, launch in getattr(plugin, "LAUNCHERS", {}).items()]
    if not entries:
        bases = ", ".join(f"{base_module}.{name}" for _, base_module, name, _ in CLASSES)
        raise UsageError(
            f"--import {module}: it defines nothing to register. Expected are subclasses of {bases}, instances of "
            "domainbed_hp.datasets.spec.DatasetSpec, or launchers, LAUNCHERS = {name: function}"
        )
    for table, name, value in entries:
        table[name] = value
    return [name for _, name, _ in entries]
