"""Imports point down, and the reporting half needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_hp

PACKAGE = Path(domainbed_hp.__file__).parent
BELOW = {
    "scripts": {"training", "planning", "plugins", "models", "keep", "runs", "settings", "checking", "sweep", "jobs",
                "progress", "reports", "model_selection", "records", "hparams_registry", "algorithms", "networks",
                "datasets", "launchers", "averages", "scoring", "logs", "machine"},
    "training": {"features", "planning", "checkpoint", "runs", "algorithms", "datasets", "records", "models", "logs",
                 "disk", "averages", "sharpness", "scoring", "speed", "logged"},
    "averages": {"hparams_registry"},
    "sharpness": {"algorithms", "hparams_registry"},
    "scoring": {"algorithms", "datasets"},
    "speed": {"algorithms"},
    "logged": {"algorithms"},
    "features": {"planning", "algorithms", "datasets", "networks", "disk", "keep"},
    "planning": {"algorithms", "datasets", "hparams_registry", "models", "keep", "machine"},
    "checkpoint": {"algorithms", "disk", "jobs"},
    "models": {"algorithms", "disk"},
    "plugins": {"algorithms", "prompts", "datasets"},
    "logs": {"machine"},
    "settings": {"sweep", "jobs"},
    "checking": {"sweep", "plugins", "hparams_registry", "algorithms", "datasets"},
    "sweep": {"jobs", "datasets"},
    "progress": {"jobs", "runs"},
    "jobs": {"runs", "disk"},
    "reports": {"model_selection", "records", "jobs", "runs"},
    "model_selection": set(),
    "records": {"disk"},
    "algorithms": {"prompts", "networks", "hparams_registry"},
    "prompts": {"networks", "hparams_registry"},
    "hparams_registry": set(),
    "networks": {"keep"},
    "datasets": {"disk", "machine"},
    "launchers": {"runs", "machine"},
    "runs": set(),
    "disk": set(),
    "keep": set(),
    "machine": set(),
    "registry": set(),
    "seeds": set(),
}  # fmt: skip


def arrows() -> list[tuple[str, str, str]]:
    """(file, layer, imported layer) for every import of the package by itself."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                parts = module.split(".")
                if parts[0] == "domainbed_hp" and len(parts) > 1 and parts[1] in BELOW and parts[1] != layer:
                    found.append((str(path.relative_to(PACKAGE)), layer, parts[1]))
    return found


def test_imports_point_down() -> None:
    allowed = {layer: below | {"registry", "seeds"} for layer, below in BELOW.items()}
    wrong = [(file, to) for file, layer, to in arrows() if layer != "__init__" and to not in allowed[layer]]
    assert not wrong
    assert len(arrows()) > 50


@pytest.mark.parametrize(
    "module",
    [
        "scripts.collect_results",
        "scripts.sweep",
        "scripts.train",
        "scripts.export",
        "scripts.interpolate",
        "records",
        "reports.report",
        "registry",
    ],
)
def test_no_torch_before_it_is_needed(module: str) -> None:
    code = f"import domainbed_hp.{module}, sys; assert not {{'torch', 'torchvision', 'open_clip'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_registry_exists() -> None:
    from domainbed_hp.registry import ALGORITHMS, AVERAGES, DATASETS, LAUNCHERS, PROMPTS, SHARPNESS, load

    for table in (ALGORITHMS, PROMPTS, AVERAGES, SHARPNESS, DATASETS, LAUNCHERS):
        for name in table:
            assert load(table, "name", name) is not None
