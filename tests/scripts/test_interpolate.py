import json
from pathlib import Path
from typing import Any

import pytest
from training.test_loop import go

from domainbed_hp import records
from domainbed_hp.reports import load
from domainbed_hp.scripts import run
from domainbed_hp.scripts.interpolate import main

HPARAMS = {"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}


def accuracies(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name.endswith("_acc")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"algorithm": "FrozenCLIP", "eval_images": 10, "trial_seed": 1}
    go(folder, **settings, hparams=json.dumps(HPARAMS | {"prompt": "random", "prompt_lr": 0.1}))  # starts at random
    return folder


def test_alphas_of_a_run_are_what_runs_with_wise_record(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    assert run(main, [str(trained), "--alphas", "0", "0.3", "1", "--output_dir", str(mixed)]) == 0
    table = capsys.readouterr().out
    last = list(records.read_records(trained))[-1]
    mixes = {a: list(records.read_records(mixed / f"run-alpha-{float(a)!r}")) for a in ("0", "0.3", "1")}
    assert all(len(lines) == 1 for lines in mixes.values())
    assert accuracies(mixes["1"][0]) == accuracies(last)
    assert mixes["1"][0]["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    args = {k: v for k, v in last["args"].items() if k not in ("output_dir", "hparams")}
    for alpha in ("0", "0.3"):
        hparams = json.loads(last["args"]["hparams"]) | {"average": "wise", "wise_alpha": float(alpha)}
        expected = go(tmp_path / alpha, **args, hparams=json.dumps(hparams))[-1]
        mix = mixes[alpha][0]
        assert accuracies(mix) == accuracies(expected) and mix["hparams"] == expected["hparams"]
        assert mix["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        known = {"output_dir": "", "label": ""}
        assert mix["args"] | known == expected["args"] | known
        assert mix["step"] == expected["step"] and mix["protocol"] == expected["protocol"]
    assert mixes["0"][0]["val_loss"] > 1.1 * last["val_loss"] or mixes["0"][0]["val_loss"] < 0.9 * last["val_loss"]
    assert f"{100 * mixes['0.3'][0]['env0_in_acc']:.1f}" in table and "env2_out" in table

    rows = load.load_runs(mixed).frame["row"]
    assert sorted(rows.unique()) == ["FrozenCLIP, alpha 0", "FrozenCLIP, alpha 0.3", "FrozenCLIP, alpha 1"]


def test_without_a_folder_nothing_is_written(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(trained.rglob("*"))
    assert run(main, [str(trained), "--alphas", "1"]) == 0
    assert "env0_in" in capsys.readouterr().out and sorted(trained.rglob("*")) == before


def test_what_cannot_be_interpolated_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [str(tmp_path)]) == 2
    assert "got no records" in capsys.readouterr().err
    assert run(main, [str(trained), "--output_dir", str(tmp_path), "--alphas", "-1"]) == 2
    assert "expected at least 0" in capsys.readouterr().err
    go(tmp_path / "sma", algorithm="LoRA", steps=1, hparams=json.dumps(HPARAMS | {"average": "sma"}))
    assert run(main, [str(tmp_path / "sma")]) == 2
    assert "got a model with average=sma" in capsys.readouterr().err
    go(tmp_path / "zero", algorithm="ZeroShotCLIP", hparams=json.dumps(HPARAMS))
    assert run(main, [str(tmp_path / "zero")]) == 2
    assert "trained nothing" in capsys.readouterr().err
    (tmp_path / "domainbed").mkdir()
    (tmp_path / "domainbed" / "results.jsonl").write_text('{"args": {"algorithm": "ERM"}, "step": 0}\n')
    assert run(main, [str(tmp_path / "domainbed")]) == 2
    assert "no model.safetensors" in capsys.readouterr().err
