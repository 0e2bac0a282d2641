"""The benchmark scripts still run, on next to nothing; what they print is not judged."""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from test_docs import program


def run(name: str, *argv: str) -> None:
    with mock.patch.object(sys, "argv", [name, *argv]):
        program(name).main()


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks pin their process to a core: not this one."""
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    run("step", "--model", "mini", "--batch", "3", "--rounds", "1", "--variants", "LoRA")
    assert re.search(r"^LoRA +off .* 1.00 \(1.00 to 1.00\)", capsys.readouterr().out, re.MULTILINE)


def test_reports(tmp_path: Path) -> None:
    reports = program("reports")
    reports.write_runs(tmp_path / "runs", 12)
    assert reports.time_process(reports.COLLECT, tmp_path / "runs") > 0
    reports.write_jobs(tmp_path / "jobs", 12, 3)
    assert reports.time_process(reports.STATUS, tmp_path / "jobs") > 0


def test_purification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trial in range(2):
        for label, mmd in (("HeadPurification", 0.1 + trial), ("HeadPurification, no MMD", 0.2 + trial)):
            args = {"algorithm": "HeadPurification", "label": label, "dataset": "PACS", "test_envs": [0]}
            accs = {f"env{i}_{split}_acc": 0.5 for i in range(3) for split in ("in", "out")}
            record = accs | {"val_mmd": mmd, "gate_shift": 0.5, "step": 0}
            record["args"] = args | {"trial_seed": trial, "hparams_seed": 0}
            (tmp_path / f"{label}{trial}").mkdir()
            (tmp_path / f"{label}{trial}" / "results.jsonl").write_text(json.dumps(record) + "\n")
    run("purification", str(tmp_path))
    assert "lower in 2 of 2 runs" in capsys.readouterr().out


@pytest.mark.slow
def test_run_and_loading(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program("run").link_images(shared_data, tmp_path, 40)
    run("run", str(tmp_path), "--images", "12", "--batch", "2", "--rounds", "1", "--device", "cpu")
    run("loading", str(tmp_path), "--images", "32", "--rounds", "1")
    out = capsys.readouterr().out
    assert "--eval fast" in out and "host alone" in out


@pytest.mark.slow
def test_faults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    faults = program("faults")
    less = {"LoRA": "LoRA", "HeadPurification": "", "FineTuneCLIP": "", "200": "8", "2": "1"}
    monkeypatch.setattr(faults, "LAUNCH", [word for flag in faults.LAUNCH if (word := less.get(flag, flag))])
    run("faults", "--kills", "1")
    assert "1 of 1 results.jsonl are equal" in capsys.readouterr().out
