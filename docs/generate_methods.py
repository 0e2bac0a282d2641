"""Write the hparam tables of docs/methods.md from the classes' HPARAMS: `python docs/generate_methods.py`.

Everything between the two markers is replaced. `--check` writes nothing and exits with 1 if the file is not current.
"""

import argparse
import ast
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_hp import registry
from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.hparams_registry import TRAINING_HPARAMS, HParam

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- generated: hparams -->", "<!-- end of generated -->"
DRAWS = 200
"""Number of draws that describe a sampler without a formula."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    check = parser.parse_args().check
    page = PAGE.read_text()
    new = update_page(page)
    if check and new != page:
        print(f"{PAGE} is not current: run `python docs/generate_methods.py`")
        return 1
    if not check:
        PAGE.write_text(new)
    return 0


def update_page(page: str) -> str:
    """Return `page` with its generated part made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n\n" + "\n\n".join(make_sections()) + "\n\n" + END + after


def make_sections() -> list[str]:
    """Return the headings and tables of all algorithms, text sides, averages and sharpness methods."""
    sections = [
        "### Every algorithm",
        make_table(TRAINING_HPARAMS),
        "### Every CLIP algorithm",
        "An algorithm below lists one of these again where its own default or draw differs.",
        make_table(CLIP_HPARAMS),
    ]
    for name in registry.ALGORITHMS:
        algorithm = registry.load(registry.ALGORITHMS, "algorithm", name)
        common = CLIP_HPARAMS if issubclass(algorithm, ClipAlgorithm) else {}
        sections += make_section(f"`{name}`", algorithm.HPARAMS, common)
    kinds = {
        "prompt": (registry.PROMPTS, "prompt"),
        "average": (registry.WEIGHT_AVERAGES, "average"),
        "sharpness": (registry.SHARPNESS, "sharpness"),
    }
    for hparam, (table, kind) in kinds.items():
        for name in table:
            sections += make_section(f"`{hparam}={name}`", registry.load(table, kind, name).HPARAMS, {})
    return sections


def make_section(title: str, hparams: Mapping[str, HParam], common: Mapping[str, HParam]) -> list[str]:
    """Return a heading and the table of the hparams that `common` does not have as they are."""
    own = {name: hparam for name, hparam in hparams.items() if common.get(name) != hparam}
    nothing = "As every CLIP algorithm." if common else "No hparams of its own."
    return [f"### {title}", make_table(own) if own else nothing]


def make_table(hparams: Mapping[str, HParam]) -> str:
    """Return a Markdown table with one line per hparam."""
    lines = ["| hparam | default | random draw | choices | meaning |", "|---|---|---|---|---|"]
    for name, hparam in hparams.items():
        cells = [f"`{name}`", describe_default(hparam), describe_draw(hparam), describe_choices(hparam), hparam.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def describe_default(hparam: HParam) -> str:
    """Return the default, and the other defaults of single data sets."""
    return "; ".join(by_value(hparam, lambda h: f"`{json.dumps(h.default)}`"))


def describe_draw(hparam: HParam) -> str:
    """Return the distribution of random draws, and the other distributions of single data sets."""
    return "; ".join(text for text in by_value(hparam, lambda h: describe_sampler(h.sample)) if text)


def by_value(hparam: HParam, describe: Callable[[HParam], str]) -> list[str]:
    """Return the description for all data sets, then those of the data sets where it differs."""
    usual, datasets = describe(hparam), {}
    for dataset, other in (getattr(hparam, "by_dataset", None) or {}).items():
        if describe(other) != usual:
            datasets.setdefault(describe(other) or "none", []).append(dataset)
    return [usual, *(f"{text} on {', '.join(names)}" for text, names in datasets.items())]


def describe_choices(hparam: HParam) -> str:
    """Return the values or the range that the hparam accepts."""
    if hparam.plugins is registry.PROMPTS:
        return "a [text side](#text-sides)"
    values = ["none", *hparam.plugins] if hparam.plugins is not None else hparam.choices
    if values:
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    limits = [f"at least {hparam.at_least:g}"] if hparam.at_least is not None else []
    limits += [f"less than {hparam.below:g}"] if hparam.below is not None else []
    return ", ".join(limits)


def describe_sampler(sample: Callable[[np.random.RandomState], Any] | None) -> str:
    """Return the distribution of a sampler in words or as a formula."""
    if sample is None:
        return ""
    variables = inspect.getclosurevars(sample).nonlocals
    if variables.keys() == {"base", "low", "high"}:
        return f"`{variables['base']}^U({variables['low']}, {variables['high']})`"
    if variables.keys() == {"values"}:
        return "one of " + ", ".join(f"`{json.dumps(value)}`" for value in variables["values"])
    return describe_lambda(sample) or describe_draws(sample)


def describe_lambda(sample: Callable[[np.random.RandomState], Any]) -> str:
    """Return the expression of a lambda such as `lambda r: int(2 ** r.uniform(3, 5.5))`; "" where it is not clear."""
    module = inspect.getmodule(sample)
    if module is None:
        return ""
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Lambda)]
    bodies = {ast.unparse(node.body) for node in nodes if node.lineno == sample.__code__.co_firstlineno}
    return f"`{bodies.pop().replace('r.uniform', 'U').replace(' ** ', '^')}`" if len(bodies) == 1 else ""


def describe_draws(sample: Callable[[np.random.RandomState], Any]) -> str:
    """Return the range of a number of draws."""
    draws = [sample(np.random.RandomState(seed)) for seed in range(DRAWS)]
    return f"{min(draws):.3g} to {max(draws):.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
