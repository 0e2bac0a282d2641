import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from made_records import launched, minimal, record, write

from domainbed_hp.registry import ALGORITHMS, LAUNCHERS
from domainbed_hp.scripts import collect_results, run, sweep
from domainbed_hp.scripts.collect_results import main


def collect(folder, *more):
    return run(main, ["--input_dir", str(folder), *map(str, more)])


@pytest.fixture
def four_runs(tmp_path):
    """Four minimal runs, one per environment of PACS."""
    for env in range(4):
        write(tmp_path / f"run{env}", record(env, 0.5))
    return tmp_path


@pytest.fixture
def domainbed_sweep(shared_data, tmp_path):
    """A copy of the runs that DomainBed ships, and what its own collector prints for them."""
    shutil.copytree(shared_data / "domainbed_sweep" / "runs", tmp_path / "runs")
    return tmp_path / "runs", (shared_data / "domainbed_sweep" / "expected.txt").read_text()


def remove(runs, env, trial):
    for file in runs.glob("*/results.jsonl"):
        args = json.loads(file.read_text().splitlines()[0])["args"]
        if args["test_envs"] == [env] and args["trial_seed"] == trial:
            shutil.rmtree(file.parent)


def test_domainbeds_own_sweep_prints_as_domainbed_prints_it(domainbed_sweep, capsys):
    runs, expected = domainbed_sweep
    for done in runs.glob("*/done"):
        done.unlink()
    assert collect(runs, "--strict") == 0
    assert capsys.readouterr() == (expected, "")
    assert (runs / "results.txt").read_text() == expected
    assert json.loads((runs / "provenance.json").read_text())["runs"] == 40


def test_a_torn_last_line_is_left_out_with_a_note(domainbed_sweep, capsys):
    runs, expected = domainbed_sweep
    torn = sorted(runs.glob("*/results.jsonl"))[0]
    torn.write_text(torn.read_text() + '{"args": {"algor')
    assert collect(runs) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert err == f"note: {torn}: line 6 is not a whole record (cut off?) and is left out\n"
    assert collect(runs, "--strict") == 2


def test_missing_jobs_are_told_marked_and_written(domainbed_sweep, capsys, tmp_path):
    runs, _ = domainbed_sweep
    remove(runs, 0, 1)
    assert collect(runs, "--missing", tmp_path / "jobs.json") == 0
    out, err = capsys.readouterr()
    assert re.search(r"^ERM +97\.\d \+/- 0\.0 ", out, re.MULTILINE), "as DomainBed: the cell of the remaining trial"
    assert err == (
        "missing: ERM, VLCS, test_envs 0, trial 1, hparams_seed 0-1\n"
        f"To complete the tables: python -m domainbed_hp.scripts.sweep launch --jobs {tmp_path / 'jobs.json'}\n"
    )
    jobs = json.loads((tmp_path / "jobs.json").read_text())["jobs"]
    assert [job["args"]["hparams_seed"] for job in jobs] == [0, 1]
    assert all((job["args"]["test_envs"], job["args"]["trial_seed"]) == ([0], 1) for job in jobs)

    collect(runs, "--latex")
    latex = capsys.readouterr().out
    iid = latex.partition("Model selection: training")[2].partition(r"\end{tabular}")[0]
    row = next(line for line in iid.splitlines() if line.startswith("ERM"))
    assert [r"\dagger" in cell for cell in row.split("&")[1:]] == [True, False, False, False, True]
    loo = latex.partition("Model selection: leave")[2].partition(r"\end{tabular}")[0]
    row = next(line for line in loo.splitlines() if line.startswith("ERM"))
    assert [r"\dagger" in cell for cell in row.split("&")[1:]] == [True, False, False, False, True]


def test_a_missing_pair_is_a_matter_of_leave_one_out_alone(domainbed_sweep, capsys):
    runs, expected = domainbed_sweep
    for file in runs.glob("*/results.jsonl"):
        args = json.loads(file.read_text().splitlines()[0])["args"]
        if args["test_envs"] == [1, 2] and args["trial_seed"] == 0 and args["hparams_seed"] == 1:
            shutil.rmtree(file.parent)
    collect(runs, "--json")
    out, err = capsys.readouterr()
    assert err == "missing: ERM, VLCS, test_envs 1,2, trial 0, hparams_seed 1\n"
    lacking = [
        (c["selection"][:5], c["dataset"], c["column"], c["missing"]) for c in json.loads(out)["cells"] if c["missing"]
    ]
    assert lacking == [
        *(("leave", "VLCS", env, 1) for env in ("L", "S")),
        ("leave", "VLCS", "Avg", 2),
        *(("leave", "Averages", column, 2) for column in ("VLCS", "Avg")),
    ]


@pytest.mark.slow
def test_what_is_missing_can_be_launched_and_completes_the_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--datasets", "Debug28", "--algorithms", "LoRA", "--test_envs", "0", "1", "2", "--n_trials", "2"]
    hparams = '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 2}'
    settings += ["--n_hparams", "1", "--steps", "3", "--hparams", hparams, "--skip_model_save", "--output_dir", "out"]
    assert run(sweep.main, ["launch", *settings, "--command_launcher", "dummy"]) == 0
    for job in json.loads(Path("out/sweep.json").read_text())["jobs"]:
        accs = {f"env{i}_{split}_acc": 0.5 for i in range(3) for split in ("in", "out")}
        if (job["args"]["test_envs"], job["args"]["trial_seed"]) != ([2], 1):
            write(Path("out", job["folder"]), {"args": job["args"], "step": 2, **accs})
            Path("out", job["folder"], "done").write_text("done")
    assert collect("out", "--strict", "--missing", "jobs.json") == 2
    out, err = capsys.readouterr()
    assert "About" in out and "missing: LoRA, Debug28, test_envs 2, trial 1, hparams_seed 0\n" in err
    assert "error: --strict: 1 jobs are missing" in err

    before = json.loads(Path("out/sweep.json").read_text())
    assert run(sweep.main, ["launch", "--jobs", "jobs.json", "--skip_confirmation"]) == 0
    assert "Launched 1 jobs!" in capsys.readouterr().out
    after = json.loads(Path("out/sweep.json").read_text())
    assert (after["spec"], after["rows"], len(after["jobs"])) == (before["spec"], before["rows"], 6)
    assert collect("out", "--strict") == 0
    assert "Total records: 7\n" in capsys.readouterr().out


@pytest.fixture
def two_sweeps(tmp_path, capsys, monkeypatch):
    """Sweeps a and b without their first run, and a file of the missing jobs, `my jobs.json`."""
    monkeypatch.chdir(tmp_path)
    args = {
        "algorithm": "ZeroShotCLIP",
        "dataset": "Debug28",
        "hparams": '{"clip_model": "mini", "clip_pretrained": "random"}',
    }
    for name in ("a", "b"):
        args_of = [{**args, "label": f"ZeroShotCLIP {name}", "test_envs": [env]} for env in range(3)]
        jobs = launched(tmp_path / "all" / name, args_of, num_envs=3)
        shutil.rmtree(jobs[0].folder)
    collect("all", "--missing", "my jobs.json")
    assert capsys.readouterr().err.endswith("sweep launch --jobs 'my jobs.json'\n")


def test_an_interrupt_stops_the_launches_of_all_sweeps(two_sweeps, capsys, monkeypatch):
    calls = []

    def launch(commands):
        calls.append(commands)
        raise KeyboardInterrupt

    monkeypatch.setitem(LAUNCHERS, "local", launch)
    assert run(sweep.main, ["launch", "--jobs", "my jobs.json", "--skip_confirmation"]) == 130
    assert len(calls) == 1
    assert "Interrupted: 1 jobs" in capsys.readouterr().err


def test_missing_jobs_of_several_sweeps_are_launched_each_in_its_own(two_sweeps, capsys):
    assert (
        run(sweep.main, ["launch", "--jobs", "my jobs.json", "--command_launcher", "dummy", "--skip_confirmation"]) == 0
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Dummy")]
    assert [re.search(r"output_dir all/(.)/", line)[1] for line in lines] == ["a", "b"]


def test_a_row_without_runs_is_an_error_under_strict(four_runs, capsys):
    write(four_runs / "elsewhere", *[record(env, 0.5, dataset="VLCS", algorithm="LoRA") for env in range(4)])
    assert collect(four_runs, "--strict") == 2
    assert "2 rows have no runs on a data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("{", [], "--jobs jobs.json: expected a file of jobs"),
        ('{"jobs": []}', [], "no jobs in it; nothing was missing"),
        ('{"jobs": [{"output_dir": "a"}]}', [], "expected a file of jobs"),
        ('{"jobs": [{"output_dir": "a", "args": {"algorithm": "LoRA"}}]}', ["--steps", "3"], "--steps with --jobs"),
        ('{"jobs": [{"output_dir": "a", "args": ARGS}]}', ["--config", "x.toml"], "--config with --jobs"),
        ('{"jobs": [{"output_dir": "a", "args": ARGS}]}', ["--import", "mine"], "leave out --import"),
        ('{"jobs": [{"output_dir": "a", "args": {"colour": 1, "REST}}]}', [], "unknown argument of train in jobs.json"),
    ],
)
def test_mistakes_in_a_file_of_jobs(tmp_path, capsys, monkeypatch, text, more, message):
    monkeypatch.chdir(tmp_path)
    args = json.dumps({**minimal()["args"], "dataset": "Debug28", "algorithm": "LoRA"})
    Path("jobs.json").write_text(text.replace("ARGS", args).replace('"REST}', args[1:]))
    assert run(sweep.main, ["launch", "--jobs", "jobs.json", "--skip_confirmation", *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a").exists()


def test_minimal_records_are_collected(four_runs, capsys):
    assert collect(four_runs) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Total records: 4\n\n-------- Dataset: PACS, model selection method: training-domain")
    assert out.count("50.0 +/- 0.0") == 10
    assert out.count(" X ") == 7
    (note,) = err.splitlines()
    assert "leave-one-domain-out cross-validation needs runs with two test environments" in note


def test_only_table_rows_begin_with_an_algorithm(four_runs, capsys):
    for env in range(4):
        one = record(env, 0.5, algorithm="HeadPurification", label="HeadPurification, no gates")
        write(four_runs / "ablation" / f"run{env}", one)
    collect(four_runs)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(ALGORITHMS))]
    assert len(lines) == 2 * 2 * 3
    assert all(re.search(r"(\d\.\d|X) +$", line) for line in lines)


def test_runs_of_different_protocols_are_rows_of_their_own(four_runs, capsys):
    for env in range(4):
        write(four_runs / f"short{env}", record(env, 0.3, steps=100))
        write(four_runs / f"long{env}", record(env, 0.7, steps=200))
        shutil.rmtree(four_runs / f"run{env}")
    collect(four_runs)
    out, err = capsys.readouterr()
    assert "ERM (steps=100)       30.0 +/- 0.0" in out and "ERM (steps=200)       70.0 +/- 0.0" in out
    assert "note: runs of 'ERM' on PACS differ in steps, so each value has its own row" in err


def test_what_the_registry_does_not_know_is_shown_and_said(four_runs, capsys):
    write(four_runs / "strange", record(0, 0.5, algorithm="Mine", dataset="Ours", num_envs=2))
    collect(four_runs)
    out, err = capsys.readouterr()
    assert "Dataset: Ours" in out and out.count("\nMine ") == 9
    assert (
        "note: data set 'Ours' is not registered: its environments are numbered; --import MODULE registers it\n" in err
    )
    assert "note: algorithm 'Mine' is not registered: its rows come last; --import MODULE registers it\n" in err


def test_the_images_of_a_folder_need_no_import(four_runs, capsys):
    write(four_runs / "strange", record(0, 0.5, dataset="folder:/data/ours"))
    collect(four_runs)
    assert "'folder:/data/ours' is not registered: its environments are numbered\n" in capsys.readouterr().err


def test_plugins_of_installed_packages_are_known(four_runs, capsys, monkeypatch):
    point = SimpleNamespace(name="Ours", value="made:OURS")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point] * (group == "domainbed_hp.algorithms"))
    with mock.patch.dict(ALGORITHMS):
        write(four_runs / "strange", record(0, 0.5, algorithm="Ours"))
        collect(four_runs)
    assert "not registered" not in capsys.readouterr().err


def test_formats_are_files_too(four_runs, capsys):
    for name, (file, _, _) in collect_results.FORMATS.items():
        assert collect(four_runs, f"--{name}") == 0
        assert (four_runs / file).read_text() == capsys.readouterr().out
    assert collect(four_runs, "--columns", "params", "--with_published") == 0
    out = capsys.readouterr().out
    assert "parameters (trained)" in out and "Published averages" in out


def test_comparison_in_place_of_tables(four_runs, capsys):
    for env in range(4):
        write(four_runs / f"lora{env}", record(env, 0.7, algorithm="LoRA"))
    assert collect(four_runs, "--compare", "LoRA", "ERM") == 0
    out, _ = capsys.readouterr()
    assert out.startswith("-------- LoRA (a) minus ERM (b), PACS") and "+20.0" in out and "Total" not in out


def test_what_cannot_be_written_is_a_note(four_runs, capsys):
    (four_runs / "results.txt").mkdir()
    assert collect(four_runs) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Total records: 4\n")
    assert f"note: {four_runs / 'results.txt'}: cannot be written: Is a directory\n" in err
    assert collect(four_runs, "--missing", four_runs) == 2


def test_many_missing_jobs_do_not_flood(tmp_path, capsys):
    launched(tmp_path, [{"algorithm": "ERM", "dataset": "PACS", "test_envs": [0], "trial_seed": t} for t in range(10)])
    collect(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("missing")]
    assert len(lines) == 21 and lines[-1] == "missing: and 10 lines more; --json lists them all"


def test_nothing_to_collect(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect(tmp_path) == 2
    assert "nothing to collect" in (err := capsys.readouterr().err) and "domainbed_hp.scripts.sweep launch" in err
    assert run(main, []) == 2
    assert "results/quickstart" in capsys.readouterr().err


def test_the_collector_imports_nothing_heavy(four_runs):
    code = (
        "import sys; from domainbed_hp.scripts.collect_results import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'torchvision', 'scipy', 'matplotlib', 'open_clip', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, "--input_dir", str(four_runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module(four_runs):
    command = [sys.executable, "-m", collect_results.__name__, "--input_dir"]
    done = subprocess.run([*command, str(four_runs)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, (four_runs / "results.txt").read_text())
    failed = subprocess.run([*command, str(four_runs / "absent")], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: cannot read") and "Traceback" not in failed.stderr
