"""What README promises, run as a reader would run it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import photo

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One `python ...` line of README, in a folder of its own."""
    argv = shlex.split(command.replace("\\\n", " "))
    assert argv[0] == "python"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), str(Path(__file__).parents[1])])}
    return subprocess.run([sys.executable, *argv[1:]], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_baseline_of_ones_own_lands_in_the_table(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("python") if "NormTuning" in b)
    (commands,) = (b for b in blocks("sh") if "--import my_method" in b)
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


def test_a_named_data_set_of_ones_own_trains(tmp_path: Path) -> None:
    (code,) = (b for b in blocks("python") if "DatasetSpec" in b)
    assert len(code[code.index("BIRDS") :].splitlines()) <= 10
    (tmp_path / "my_data.py").write_text(code)
    for i, name in enumerate(("day/crow", "day/tawny_owl", "night/crow", "night/tawny_owl")):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for j in range(5):
            photo(40, 30, 5 * i + j).save(tmp_path / "birds" / name / f"{j}.jpg")
    command = "python -m domainbed_hp.scripts.train --import my_data --dataset Birds --data_dir . --test_envs 1"
    hparams = """--hparams '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'"""
    result = shell(f"{command} {hparams} --steps 2 --output_dir run", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "done").exists()


@pytest.mark.slow
def test_quickstart_prints_a_table_that_compiles(tmp_path: Path) -> None:
    first = next(b for b in blocks("sh") if "--latex" in b).strip()
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


def test_defaults_in_the_table_are_the_defaults() -> None:
    from domainbed_hp.algorithms.head_purification import HeadPurification

    general = {"clip_model", "clip_pretrained", "batch_size", "input_norm", "augmentation", "gate_shuffle"}
    for name in HeadPurification.HPARAMS.keys() - general:
        assert f"`{name}`" in README, name
    table = README.partition("| hparam | default | choices |")[2].partition("\n\n")[0]
    for line in table.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0]) if line.startswith("| `") and len(cells) == 3 else []
        if names:
            values = [v.strip("` ") for v in cells[1].split(",")]
            found = [HeadPurification.HPARAMS[n].default for n in names]
            assert [type(f)(v) for f, v in zip(found, values, strict=True)] == found
