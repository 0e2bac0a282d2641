import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs, find_differences, name_flags

PACKAGE = Path(__file__).parents[1] / "domainbed_hp"
NEW_FLAG = '    colour: str = flag("red", "colour of the run", role="protocol", choices=("red", "blue"))\n'
KNOWN_EVERYWHERE = """
import json, sys
from pathlib import Path
import domainbed_hp
from domainbed_hp.reports.load import load_runs
from domainbed_hp.run_args import PROTOCOL, RunArgs
from domainbed_hp.scripts import sweep, train
from domainbed_hp.sweep.config import spec_from
from domainbed_hp.sweep.spec import make_jobs

assert Path(domainbed_hp.__file__).parents[1] == Path.cwd()
for parser in (train.make_parser(), sweep.make_parser()):
    assert "--colour {red,blue}" in parser.format_help() and "colour of the run (default: red)" in parser.format_help()
assert RunArgs.of(vars(train.make_parser().parse_args([]))).colour == "red" == PROTOCOL["colour"]

Path("s.toml").write_text('output_dir = "out"\\ndatasets = ["Debug28"]\\n[[rows]]\\nalgorithm = "ERM"\\n')
Path("blue.toml").write_text('colour = "blue"\\n' + Path("s.toml").read_text())
jobs = {}
for name, config, flags in (("red", "s", []), ("flag", "s", ["--colour", "blue"]), ("file", "blue", [])):
    args = vars(sweep.make_parser().parse_args(["launch", *flags]))
    given = {name: value for name, value in args.items() if name not in sweep.NOT_SETTINGS and value is not None}
    spec = spec_from(f"{config}.toml", given)
    jobs[name] = make_jobs(spec, spec.rows)[0]
assert "--colour blue" in " ".join(jobs["flag"].command) and "--colour" not in jobs["red"].command
assert jobs["flag"] == jobs["file"] and jobs["flag"].folder != jobs["red"].folder

for i, colour in enumerate(["red", "blue"]):
    folder = Path("runs") / colour
    folder.mkdir(parents=True)
    ids = {"algorithm": "ERM", "dataset": "Debug28", "test_envs": [0], "trial_seed": i, "hparams_seed": 0}
    accs = {f"env{env}_{split}_acc": 0.5 for env in range(3) for split in ("in", "out")}
    (folder / "results.jsonl").write_text(json.dumps({"args": ids | {"colour": colour}, "step": 0, **accs}) + "\\n")
assert sorted(run.row for run in load_runs("runs").runs) == ["ERM (colour=blue)", "ERM (colour=red)"]
"""


def test_a_new_flag_is_one_edit(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "domainbed_hp", ignore=shutil.ignore_patterns("__pycache__", "mini"))
    file = tmp_path / "domainbed_hp" / "run_args.py"
    before, field, after = file.read_text().partition("    seed: int = flag(")
    file.write_text(before + NEW_FLAG + field + after)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", KNOWN_EVERYWHERE], cwd=tmp_path, env=env, check=True)


def test_arguments_of_a_record_are_read_back() -> None:
    args = RunArgs("out", test_envs=(0, 2), imports=("a",), steps=3)
    record = json.loads(json.dumps(asdict(args)))
    assert RunArgs.of(record) == args
    assert RunArgs.of(record | {"loader": "batched"}) == args, "of an earlier version"
    del record["features"]
    assert RunArgs.of(record) == args, "of a version before the flag"
    with pytest.raises(UsageError, match="unknown argument of a run 'loader'"):
        RunArgs.of(record | {"loader": "reference"})
    assert name_flags(asdict(args))["import"] == ["a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp16"}, "unknown precision 'fp16'.*Known: fp32, bf16"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"num_workers": -1}, "num_workers: got -1, expected at least 0"),
    ],
)
def test_values_are_checked(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunArgs.of(values)


def test_what_makes_two_runs_different() -> None:
    args = asdict(RunArgs("out"))
    moved = args | {"output_dir": "elsewhere", "data_dir": "/data", "device": "cuda", "test_envs": [0]}
    assert find_differences(moved, args) == {}
    assert find_differences(args | {"seed": 3}, args) == {"seed": (3, 0)}
    assert find_differences({name: args[name] for name in args if name != "save"}, args) == {}, "it was the default"
    assert find_differences(args | {"loader": "batched"}, args) == {}
    assert find_differences(args | {"loader": "reference"}, args) == {"loader": ("reference", "batched")}
    domainbed = {name: args[name] for name in ("algorithm", "dataset", "test_envs", "seed", "steps")}
    assert "save" in find_differences(domainbed, args), "its records are never dropped as those of an unfinished run"
