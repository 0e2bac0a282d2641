"""README and docs: links lead somewhere, commands parse, tables are current, examples run."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from helpers import photo

import domainbed_hp
from domainbed_hp import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "results" / "README.md",
        ROOT / "domainbed_hp" / "networks" / "mini" / "README.md",
    ]
)
CHECKED = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names flags that are gone
SCRIPTS = sorted(path.stem for path in (ROOT / "domainbed_hp" / "scripts").glob("[!_]*.py"))
FILES = {path.stem: path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))}
del FILES["common"]  # no program, but what benchmarks share
PROGRAMS = [*SCRIPTS, *FILES]
HEADPURIFICATION = "### `HeadPurification`"
MINI_SWEEP = (
    """ --single_test_envs --n_trials 1 --n_hparams 1 --hparams '{"clip_model": "mini", "clip_pretrained": "shapes"}'"""
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


# Links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    result: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        result.add(next(name for i in range(99) if (name := f"{slug}-{i}" if i else slug) not in result))
    return result


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[1](#a-b-c) [2](page.md#a-b-c) [3](none.md) [4](#none) [5](https://example.org)\n")
    assert broken_links(page) == ["none.md", "#none"]


# Commands


class Parsed(Exception):
    """A command line was accepted by its parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def load_file(path: Path) -> ModuleType:
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


@cache
def program(name: str) -> ModuleType:
    if name in SCRIPTS:
        return importlib.import_module(f"domainbed_hp.scripts.{name}")
    return load_file(FILES[name])


def parser_of(name: str, argv: list[str]) -> argparse.ArgumentParser:
    """The parser of a program, once it has accepted `argv`; ValueError with its message where it refuses them."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if argv:
            parse_args(parser, argv, namespace)
        raise Parsed(parser)

    errors = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys, "argv", [name, *argv]),
        contextlib.redirect_stderr(errors),
    ):
        try:
            program(name).main()
        except Parsed as parsed:
            return parsed.parser
        except SystemExit:
            pass
    raise ValueError(errors.getvalue().strip().splitlines()[-1:])


@cache
def options(name: str) -> dict[str, tuple[str, ...]]:
    """Flag -> its choices, of a program."""
    actions = parser_of(name, [])._actions
    return {flag: tuple(action.choices or ()) for action in actions for flag in action.option_strings}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, arguments) of every command of the package in shell blocks, code spans and comments of a page."""
    spans = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    spans += re.findall(r"`([^`]+)`", without_blocks(text))
    spans += ["\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE))]
    for span in spans:
        lines = re.sub(r"\\\n", " ", span)
        lines = lines if span.endswith("\n") or lines.count("python ") > 1 else lines.replace("\n", " ")
        for line in re.split(r"\n|&&", lines):
            match = re.match(
                r" *python (?:-m domainbed_hp\.scripts\.(\w+)|(?:benchmarks|examples)/(\w+)\.py)(.*)", line
            )
            if match:
                yield match[1] or match[2], shlex.split(match[3].split("  (")[0], comments=True)


def wrong_commands(text: str) -> list[str]:
    """The commands of a page that their program would refuse, and why."""
    wrong = []
    for name, argv in commands(text):
        given = [word.split("=")[0] for word in argv if word.startswith("--")]
        if name not in PROGRAMS:
            wrong.append(f"{name}: there is no such program")
            continue
        wrong += [f"{name}: no flag {flag}" for flag in given if flag not in options(name)]  # no abbreviations either
        if not argv:  # the program's name alone, where the page speaks of it
            continue
        try:
            parser_of(name, argv)
        except ValueError as error:
            wrong.append(f"{name} {shlex.join(argv)}: {error}")
        files = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--config"]
        wrong += [f"{name}: no file {file}" for file in files if not (ROOT / file).exists()]
    return wrong


def wrong_flags(text: str) -> list[str]:
    """Flags in code spans, such as `--eval fast`, that no program has, or with a value that is none of its choices."""
    wrong = []
    for span in re.findall(r"`([^`]+)`", without_blocks(text)):
        programs = [name for name in SCRIPTS if re.match(rf"{name}\b", span)] or PROGRAMS
        for flag, value in re.findall(r"(--\w+)(?: +([\w.]+))?", span):
            known = [options(name)[flag] for name in programs if flag in options(name)]
            if not known:
                wrong.append(f"`{span}`: {', '.join(programs)}: no flag {flag}")
            elif value and all(known) and value.islower() and not any(value in choices for choices in known):
                wrong.append(f"`{span}`: {value} is no choice of {flag}")
    return wrong


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    assert not wrong_commands(page.read_text())
    assert not wrong_flags(page.read_text())


@pytest.mark.parametrize("sweep", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_command_of_a_sweep_file_parses(sweep: Path) -> None:
    text = sweep.read_text()
    assert list(commands(text)) and not wrong_commands(text)


def test_a_wrong_command_is_noticed() -> None:
    def block(line: str) -> list[str]:
        return wrong_commands(f"```sh\n{line}\n```\n")

    assert not block("python -m domainbed_hp.scripts.train --eval fast \\\n    --steps 3")
    for line in ("train --loader reference", "train --eval slow", "train --eva fast", "train --steps many", "worker"):
        assert block(f"python -m domainbed_hp.scripts.{line}"), line
    assert block("python -m domainbed_hp.scripts.sweep start")
    assert block("pip install .\npython -m domainbed_hp.scripts.train --loader reference")
    assert block("pip install . && python -m domainbed_hp.scripts.sweep launch --jobs_per_process 2")
    assert wrong_commands("`python -m domainbed_hp.scripts.sweep launch --config sweeps/none.toml`")
    assert not wrong_flags("`--eval fast`, `download --check --json`, `--archive PATH`")
    for span in ("--loader reference", "--eval slow", "download --eval fast"):
        assert wrong_flags(f"`{span}`"), span


def test_every_program_has_a_parser() -> None:
    for name in PROGRAMS:
        assert "--help" in options(name), name


# README


def test_readme_is_a_page() -> None:
    lines = text_of("README.md").splitlines()
    assert 120 <= len(lines) <= 150
    top = "\n".join(lines[:10])
    assert "https://github.com/facebookresearch/DomainBed" in top
    assert "Not reproduced" in top


def test_readme_leads_to_every_page_of_docs() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in text_of("README.md"), page.name


def test_readme_and_docs_name_every_method() -> None:
    tables = [registry.ALGORITHMS, registry.PROMPTS]
    for page in ("README.md", "docs/methods.md"):
        rows = re.findall(r"^\| \**`(\w+)`\** \|", text_of(page).partition("## Hparams")[0], re.MULTILINE)
        for table in tables:
            assert sorted(set(rows) & set(table)) == sorted(table), page


def test_ci_finds_the_command_of_the_tests() -> None:
    lines = [line for line in text_of("README.md").splitlines() if line.endswith("python -m pytest -n auto")]
    assert lines == ['pip install ".[test]" && python -m pytest -n auto']


def test_the_citation_names_this_version() -> None:
    assert re.search(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE)[1] == domainbed_hp.__version__  # type: ignore[index]


def test_the_layout_in_design_is_that_of_the_package() -> None:
    layout = next(
        block for block in re.findall(r"```\n(.*?)```", text_of("docs/design.md"), re.DOTALL) if "seeds.py" in block
    )
    package = {name for name in re.findall(r"^  (\w+(?:\.py|/))", layout, re.MULTILINE)}
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "domainbed_hp").iterdir()}
    assert package == there - {"__init__.py", "__pycache__/"}


# Tables of hparams


def test_tables_of_hparams_are_current() -> None:
    page = text_of("docs/methods.md")
    assert load_file(ROOT / "docs" / "generate_methods.py").update_page(page) == page, (
        "run `python docs/generate_methods.py`"
    )


def test_defaults_in_the_table_are_the_defaults() -> None:
    from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS
    from domainbed_hp.algorithms.head_purification import HeadPurification

    section = text_of("docs/methods.md").partition(f"{HEADPURIFICATION}\n")[2].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)`", section, re.MULTILINE))
    assert set(rows) >= HeadPurification.HPARAMS.keys() - CLIP_HPARAMS.keys()
    for name, default in rows.items():
        assert json.loads(default) == HeadPurification.HPARAMS[name].default, name


# Examples


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One `python ...` line of a page, in a folder of its own."""
    argv = shlex.split(command.replace("\\\n", " "))
    assert argv[0] == "python"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), str(ROOT)])}
    return subprocess.run([sys.executable, *argv[1:]], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_baseline_of_ones_own_lands_in_the_table(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("docs/add_a_method.md", "python") if "class NormTuning" in b)
    (commands,) = (b for b in blocks("docs/add_a_method.md", "sh") if "--import my_method" in b)
    (tmp_path / "my_method.py").write_text(code)
    launch, collect = re.findall(r"python (?:.|\\\n)*?(?<!\\)\n", commands)
    short = launch
    for long, quick in (("--steps 50", "--steps 2"), ("ZeroShotCLIP ", ""), ("ShapesDG", "Debug28")):
        assert long in short
        short = short.replace(long, quick)
    result = shell(short, tmp_path)
    assert result.returncode == 0, result.stderr
    table = shell(collect, tmp_path)
    assert table.returncode == 0, table.stderr
    rows = [line for line in table.stdout.splitlines() if line.startswith("NormTuning")]
    assert rows and re.search(r"\d+\.\d \+/- \d\.\d", rows[0])


def test_a_loss_of_ones_own_trains_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (code,) = (b for b in blocks("docs/add_a_method.md", "python") if "class SmoothedCLIP" in b)
    (tmp_path / "my_loss.py").write_text(code)
    hparams = {"clip_model": "mini", "clip_pretrained": "shapes", "class_names": ["boat", "car"], "steps": 2}
    algorithm_class = load_file(tmp_path / "my_loss.py").SmoothedCLIP
    hparams = {name: h.default for name, h in algorithm_class.HPARAMS.items()} | {"template": "{}"} | hparams
    algorithm = algorithm_class((3, 64, 64), 2, 2, hparams)
    before = [p.clone() for p in algorithm.tower.parameters()]
    minibatches = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1])) for _ in range(2)]
    assert {"ce", "confidence"} <= set(algorithm.update(minibatches))
    assert any(not torch.equal(a, b) for a, b in zip(before, algorithm.tower.parameters(), strict=True))


def test_the_hparams_example_is_valid() -> None:
    from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS
    from domainbed_hp.hparams_registry import HParam, log_uniform

    (code,) = (b for b in blocks("docs/add_a_method.md", "python") if "by_dataset" in b)
    names = {"HParam": HParam, "log_uniform": log_uniform, "CLIP_HPARAMS": CLIP_HPARAMS}
    exec(code, names)
    assert names["HPARAMS"]["lr"].default == 5e-6  # type: ignore[index]


@pytest.mark.slow
def test_the_check_of_a_method_passes(tmp_path: Path) -> None:
    method, check = (b for b in blocks("docs/add_a_method.md", "python") if "NormTuning" in b)
    (tmp_path / "my_method.py").write_text(method)
    (tmp_path / "check.py").write_text(check)
    result = shell("python check.py", tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_selection_rule_of_ones_own_makes_tables(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("docs/add_a_method.md", "python") if "class LastRecord" in b)
    (tmp_path / "my_rule.py").write_text(code)
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0}
    accs = {f"env{i}_{split}_acc": 0.5 for i in range(4) for split in ("in", "out")}
    records = [
        accs | {"args": args, "step": 0, "env1_out_acc": 0.9},
        accs | {"args": args, "step": 300, "env0_in_acc": 0.75},
    ]
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "results.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    collect = "python -m domainbed_hp.scripts.collect_results --import my_rule --input_dir runs"
    tables = shell(collect, tmp_path).stdout.split("\n\n")
    assert " 75.0 +/- 0.0 " in next(t for t in tables if "training-domain validation set, last record\n" in t)
    assert " 50.0 +/- 0.0 " in next(t for t in tables if "training-domain validation set\n" in t)


@pytest.mark.slow
def test_a_launcher_of_ones_own_runs_jobs(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("docs/add_a_method.md", "python") if "def launch" in b)
    (command,) = (b for b in blocks("docs/add_a_method.md", "sh") if "--import my_cluster" in b)
    (tmp_path / "my_cluster.py").write_text(code)
    less = "--algorithms ZeroShotCLIP --datasets Debug28 --output_dir out --skip_confirmation"
    result = shell(command.strip().replace("--config sweeps/quickstart.toml", less) + MINI_SWEEP, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("out/*/done"))) == 3


def test_a_named_data_set_of_ones_own_trains(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("docs/datasets.md", "python") if "DatasetSpec" in b)
    assert len(code[code.index("BIRDS") :].splitlines()) <= 10
    (tmp_path / "my_data.py").write_text(code)
    for i, name in enumerate(("day/crow", "day/tawny_owl", "night/crow", "night/tawny_owl")):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for j in range(5):
            photo(40, 30, 5 * i + j).save(tmp_path / "birds" / name / f"{j}.jpg")
    (commands,) = (b for b in blocks("docs/datasets.md", "sh") if "--import my_data" in b)
    command = commands.strip().replace("--data_dir DATA", "--data_dir .")
    hparams = """--hparams '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'"""
    result = shell(f"{command} {hparams} --steps 2 --output_dir run", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "done").exists()


@pytest.mark.slow
def test_quickstart_prints_a_table_that_compiles(tmp_path: Path) -> None:
    first = next(b for b in blocks("README.md", "sh") if "--latex" in b).strip()
    install, launch, collect = first.split(" && ")
    assert install == "pip install ."
    result = shell(launch, tmp_path)
    assert result.returncode == 0, result.stderr
    table = shell(collect, tmp_path)
    assert table.returncode == 0, table.stderr
    assert re.search(r"^HeadPurification & (\\\w+\{)?\d", table.stdout, re.MULTILINE)
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    (tmp_path / "table.tex").write_text(table.stdout)
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    assert subprocess.run(latex, cwd=tmp_path, capture_output=True).returncode == 0
