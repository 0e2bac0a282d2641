import json
import re
import shutil
import subprocess
import sys

import pytest

from domainbed_hp.registry import ALGORITHMS, UsageError
from domainbed_hp.scripts import collect_results, run
from domainbed_hp.scripts.collect_results import main


def make_run(folder, env, trial_seed=0, **args):
    """A run folder with one minimal record."""
    folder.mkdir(parents=True)
    args = {"algorithm": "ERM", "dataset": "PACS", "hparams_seed": 0, "trial_seed": trial_seed, **args}
    record = {"args": {**args, "test_envs": [env]}, "step": 0, f"env{env}_in_acc": 0.5}
    record |= {f"env{i}_out_acc": 0.5 for i in range(4)}
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture
def sweep(tmp_path):
    """Four minimal runs, one per environment of PACS."""
    for env in range(4):
        make_run(tmp_path / f"run{env}", env)
    return tmp_path


@pytest.fixture
def domainbed_sweep(shared_data, tmp_path):
    """A copy of the runs that DomainBed ships, and what its own collector prints for them."""
    shutil.copytree(shared_data / "domainbed_sweep" / "runs", tmp_path / "runs")
    return tmp_path / "runs", (shared_data / "domainbed_sweep" / "expected.txt").read_text()


def test_domainbeds_own_sweep_prints_as_domainbed_prints_it(domainbed_sweep, capsys):
    runs, expected = domainbed_sweep
    for done in runs.glob("*/done"):
        done.unlink()
    assert main(["--input_dir", str(runs)]) == 0
    assert capsys.readouterr() == (expected, "")
    assert (runs / "results.txt").read_text() == expected


def test_a_torn_last_line_is_left_out_with_a_note(domainbed_sweep, capsys):
    runs, expected = domainbed_sweep
    torn = sorted(runs.glob("*/results.jsonl"))[0]
    torn.write_text(torn.read_text() + '{"args": {"algor')
    main(["--input_dir", str(runs)])
    out, err = capsys.readouterr()
    assert out == expected
    assert err == f"note: {torn}: line 6 is not a whole record (torn?) and is left out\n"


def test_a_missing_trial_is_told_on_stderr(domainbed_sweep, capsys):
    runs, _ = domainbed_sweep
    for file in runs.glob("*/results.jsonl"):
        args = json.loads(file.read_text().splitlines()[0])["args"]
        if args["test_envs"] == [0] and args["trial_seed"] == 1:
            shutil.rmtree(file.parent)
    main(["--input_dir", str(runs)])
    out, err = capsys.readouterr()
    # As DomainBed: the cell of the remaining trial.
    assert re.search(r"^ERM +97\.\d \+/- 0\.0 ", out, re.MULTILINE)
    assert "note: ERM, VLCS, environment C: 1 of 2 trials (training-domain validation set)\n" in err
    assert len(err.splitlines()) == 3


def test_minimal_records_are_collected(sweep, capsys):
    main(["--input_dir", str(sweep)])
    out, err = capsys.readouterr()
    assert out.startswith("Total records: 4\n\n-------- Dataset: PACS, model selection method: training-domain")
    assert out.count("50.0 +/- 0.0") == 10
    assert out.count(" X ") == 7
    (note,) = err.splitlines()
    assert "leave-one-domain-out cross-validation needs runs with two test environments" in note


def test_only_table_rows_begin_with_an_algorithm(sweep, capsys):
    for env in range(4):
        make_run(
            sweep / "ablation" / f"run{env}", env, algorithm="HeadPurification", label="HeadPurification, no gates"
        )
    main(["--input_dir", str(sweep)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(ALGORITHMS))]
    assert len(lines) == 2 * 2 * 3
    assert all(re.search(r"(\d\.\d|X) +$", line) for line in lines)


def test_a_row_without_runs_is_told_once(sweep, capsys):
    make_run(sweep / "elsewhere", 0, dataset="VLCS")
    make_run(sweep / "lora", 0, algorithm="LoRA")
    main(["--input_dir", str(sweep)])
    assert capsys.readouterr().err.count("LoRA, VLCS") == 1


def test_latex(sweep, capsys):
    main(["--input_dir", str(sweep), "--latex"])
    out = capsys.readouterr().out
    assert out.startswith("\\documentclass") and "% Total records: 4\n" in out
    assert (sweep / "results.tex").read_text() == out
    assert not (sweep / "results.txt").exists()


def test_what_cannot_be_written_is_a_note(sweep, capsys):
    (sweep / "results.txt").mkdir()
    assert main(["--input_dir", str(sweep)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Total records: 4\n")
    assert f"note: {sweep / 'results.txt'} is not written: Is a directory\n" in err


def test_sweep_json_gives_the_order_of_rows_and_the_planned_trials(sweep, capsys):
    for label in ("ERM, a", "ERM, b"):
        for env in range(4):
            make_run(sweep / label / f"run{env}", env, label=label)
    jobs = [
        {"folder": f"run{env}", "args": {"dataset": "PACS", "trial_seed": trial}} for env in (0, 1) for trial in (0, 1)
    ]
    (sweep / "run0" / "done").touch()
    rows = [{"algorithm": "ERM", "label": label} for label in ("ERM, b", None)]
    (sweep / "sweep.json").write_text(json.dumps({"rows": rows, "jobs": jobs}))
    main(["--input_dir", str(sweep)])
    out, err = capsys.readouterr()
    assert [line[:6] for line in out.splitlines() if line.startswith("ERM")][:3] == ["ERM, b", "ERM   ", "ERM, a"]
    assert "note: ERM, PACS, environment A: 1 of 2 trials (training-domain validation set)\n" in err
    assert err.endswith("note: 2 jobs of this sweep are not done; what they have recorded so far is counted\n")


@pytest.mark.parametrize("text", ["{", "[1]", '{"rows": [1]}', '{"rows": [], "jobs": [{}]}'])
def test_a_broken_sweep_json_is_refused(sweep, text):
    (sweep / "sweep.json").write_text(text)
    with pytest.raises(UsageError, match="sweep.json is not a sweep file"):
        main(["--input_dir", str(sweep)])


def test_runs_of_different_protocols_are_not_averaged(sweep, capsys):
    make_run(sweep / "short", 0, trial_seed=1, steps=100)
    make_run(sweep / "long", 1, trial_seed=1, steps=200)
    assert run(main, ["--input_dir", str(sweep)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: runs of row 'ERM' on PACS differ in steps: 200 in ")
    assert str(sweep / "short") in err and str(sweep / "long") in err


def test_nothing_to_collect(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(main, ["--input_dir", str(tmp_path)]) == 2
    assert "nothing to collect" in (err := capsys.readouterr().err) and "domainbed_hp.scripts.sweep launch" in err
    assert run(main, []) == 2
    assert "results/quickstart" in capsys.readouterr().err


def test_the_collector_imports_nothing_heavy(sweep):
    code = (
        "import sys; from domainbed_hp.scripts.collect_results import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'torchvision', 'scipy', 'matplotlib', 'open_clip'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, "--input_dir", str(sweep)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module(sweep):
    command = [sys.executable, "-m", collect_results.__name__, "--input_dir"]
    done = subprocess.run([*command, str(sweep)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, (sweep / "results.txt").read_text())
    failed = subprocess.run([*command, str(sweep / "absent")], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: cannot read") and "Traceback" not in failed.stderr
