"""Imports point down, and the reporting half needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_hp

PACKAGE = Path(domainbed_hp.__file__).parent
BELOW = {
    "scripts": {"training", "sweep", "reports", "launchers", "plugins", "run_args", "run_dir", "records",
                "model_selection", "hparams_registry", "algorithms", "prompts", "networks", "datasets", "files"},
    "testing": {"training", "algorithms", "prompts", "networks", "datasets", "hparams_registry"},
    "reports": {"run_args", "sweep.jobs", "run_dir", "records", "model_selection"},
    "sweep.validation": {"sweep.spec", "plugins", "hparams_registry", "algorithms", "datasets"},
    "sweep": {"run_args", "plugins", "launchers", "datasets", "run_dir", "records", "files"},
    "launchers": {"run_dir", "files"},
    "training": {"algorithms", "datasets", "networks", "hparams_registry", "run_args", "run_dir", "records", "files"},
    "plugins": set(),
    "run_args": set(),
    "algorithms": {"prompts", "networks", "hparams_registry"},
    "prompts": {"networks", "hparams_registry"},
    "networks": set(),
    "datasets": {"files", "networks.preprocess"},
    "records": {"files", "run_dir"},
    "run_dir": set(),
    "model_selection": set(),
    "hparams_registry": set(),
    "files": set(),
    "registry": set(),
    "seeds": set(),
}  # fmt: skip


def layer_of(module: str) -> str:
    """Return the longest name in `BELOW` that is the module or a package around it, "" for none."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((name for name in names if name in BELOW), "")


def find_arrows() -> list[tuple[str, str, str]]:
    """(file, layer, imported module) for every import of the package by itself, also those inside of functions."""
    arrows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        layer = layer_of(".".join(relative.parts))
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            arrows += [(str(relative), layer, m) for m in modules if m.startswith("domainbed_hp.") and layer_of(m)]
    return arrows


def allowed(layer: str, module: str) -> bool:
    """Return True if a file of `layer` may import `module`, which is in its own package or in what `BELOW` lists."""
    to = module.split(".", 1)[1]
    names = BELOW[layer] | {layer, layer.partition(".")[0], "registry", "seeds"}
    return any(to == name or to.startswith(f"{name}.") for name in names)


def test_imports_point_down() -> None:
    assert not [(file, module) for file, layer, module in find_arrows() if layer and not allowed(layer, module)]
    assert len(find_arrows()) > 50


def test_every_module_has_a_layer() -> None:
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    assert [module for module in modules if not layer_of(module)] == ["domainbed_hp.__init__"]


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
    from domainbed_hp.registry import ALGORITHMS, DATASETS, LAUNCHERS, PROMPTS, SHARPNESS, WEIGHT_AVERAGES, load

    for table in (ALGORITHMS, PROMPTS, WEIGHT_AVERAGES, SHARPNESS, DATASETS, LAUNCHERS):
        for name in table:
            assert load(table, "name", name) is not None
