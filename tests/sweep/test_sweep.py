import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import photo
from leases import REMOTE_LEASE

from domainbed_hp import registry, run_dir
from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import State
from domainbed_hp.scripts import run
from domainbed_hp.scripts import sweep as script
from domainbed_hp.sweep import jobs as jobs_module
from domainbed_hp.sweep.config import spec_from
from domainbed_hp.sweep.jobs import Job, load_jobs, make_job_name
from domainbed_hp.sweep.spec import Row, SweepSpec, describe_sweep, make_jobs
from domainbed_hp.sweep.validation import resolve_rows

ROOT = Path(__file__).parents[2]

# DomainBed's job folders and seeds of ERM on PACS, trial 0, hparams seed 0, test environments 0..3.
GOLDEN = [
    ("ccbf3907c0fcc2d6f6cfda345a14214b", 94828300),
    ("4b275eab2f2fc66601678f18d39d2f27", 970950204),
    ("a7c23c0b48e8a9ee5822dcec944784c1", 1164463227),
    ("00e49d8ab04cef391d4400afc7a872aa", 1592993),
]


class StubERM:
    HPARAMS = {"lr": HParam(1e-3)}

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        pass

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        return Preprocess(image_size)


class StubLoRA(StubERM):
    HPARAMS = {"lr": HParam(1e-3), "lora_rank": HParam(4)}


STUB_TRAIN = """
import json, sys
from pathlib import Path
from domainbed_hp.run_dir import RunLock
from domainbed_hp.scripts import run

def main(argv):
    folder = Path(argv[argv.index("--output_dir") + 1])
    with RunLock(folder):
        if "LoRA" in argv and not Path("repaired").exists():
            (folder / "out.txt").touch()
            raise RuntimeError("LoRA is broken")
        with open(folder / "argv.jsonl", "a") as file:
            file.write(json.dumps(argv) + "\\n")
        (folder / "done").write_text("done")
    return 0

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
"""


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ERM and LoRA without torch, a `train` that only notes its arguments, and tmp_path as the current folder."""
    monkeypatch.setitem(registry.ALGORITHMS, "ERM", f"{__name__}:StubERM")
    monkeypatch.setitem(registry.ALGORITHMS, "LoRA", f"{__name__}:StubLoRA")
    (tmp_path / "stub_train.py").write_text(STUB_TRAIN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs_module, "TRAIN_MODULE", "stub_train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of all calls of the local launcher, which launches nothing: commands, options, commands, ..."""
    calls: list[Any] = []

    def launch(commands: list[list[str]], max_parallel: int | None = None) -> list[int]:
        calls.extend([commands, {"max_parallel": max_parallel}])
        return [0] * len(commands)

    monkeypatch.setitem(registry.LAUNCHERS, "local", launch)
    return calls


def spec_of(**values: Any) -> SweepSpec:
    values = {"output_dir": "out", "datasets": ["PACS"], "rows": [{"algorithm": "ERM"}], "n_hparams": 1} | values
    return SweepSpec.of(values, "test")


def jobs_of(**values: Any) -> list[Job]:
    spec = spec_of(**values)
    return make_jobs(spec, spec.rows)


def test_domainbeds_job_names_and_seeds() -> None:
    jobs = jobs_of(data_dir="/my/datasets/path", n_trials=1, single_test_envs=True)
    assert [(make_job_name(job.args), job.args["seed"]) for job in jobs] == GOLDEN


def test_domainbeds_shipped_sweep(shared_data: Path) -> None:
    jobs = jobs_of(datasets=["VLCS"], data_dir="/checkpoint/dlp/datasets_new", n_trials=2, n_hparams=2, steps=1001)
    shipped = {path.parent.name for path in (shared_data / "domainbed_sweep").rglob("done")}
    assert len(shipped) == 40
    assert {make_job_name(job.args) for job in jobs} == shipped


def test_domainbeds_command() -> None:
    job = jobs_of(data_dir="/my/datasets/path", n_trials=1)[0]
    golden = (
        f"-m domainbed_hp.scripts.train --algorithm ERM --data_dir /my/datasets/path --dataset PACS "
        f"--holdout_fraction 0.2 --hparams_seed 0 --output_dir {job.folder} --seed 94828300 "
        f"--task domain_generalization --test_envs 0 --trial_seed 0"
    )
    assert job.command == [sys.executable, *golden.split()]


def test_lists_and_booleans_in_a_command() -> None:
    job = jobs_of(test_envs=[[0, 2]], skip_model_save=True, imports=["mine.a", "mine.b"])[0]
    command = " ".join(job.command)
    assert "--import mine.a mine.b " in command
    assert "--test_envs 0 2 " in command
    assert "--skip_model_save --task " in command


@pytest.mark.parametrize(
    "change", [{"data_dir": "elsewhere/"}, {"device": "cuda:1"}, {"compile": "off"}, {"output_dir": "moved"}]
)
def test_where_a_job_runs_is_not_its_identity(change: dict[str, Any]) -> None:
    assert [j.folder.name for j in jobs_of(**change)] == [j.folder.name for j in jobs_of(data_dir="/data")]


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"precision": "bf16"}, {"eval": "fast"}, {"eval_images": 10}, {"holdout_fraction": 0}]
)
def test_what_a_job_computes_is_its_identity(change: dict[str, Any]) -> None:
    assert not {j.folder.name for j in jobs_of(**change)} & {j.folder.name for j in jobs_of()}


def test_nesting_order_and_count() -> None:
    """The case of DomainBed's test_make_args_list: 2 trials, 3 hparams seeds, Debug28 with 3 singles and 3 pairs."""
    jobs = jobs_of(datasets=["Debug28"], n_trials=2, n_hparams_from=0, n_hparams=3)
    assert len(jobs) == 2 * 3 * 6
    order = [(j.args["trial_seed"], j.args["test_envs"], j.args["hparams_seed"]) for j in jobs]
    envs = [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    assert order == [(trial, env, seed) for trial in range(2) for env in envs for seed in range(3)]


def test_data_sets_are_outside_rows() -> None:
    jobs = jobs_of(datasets=["PACS", "VLCS"], rows=[{"algorithm": "LoRA"}, {"algorithm": "ERM"}], n_trials=1)
    pairs = list(dict.fromkeys((job.args["dataset"], job.args["algorithm"]) for job in jobs))
    assert pairs == [("PACS", "LoRA"), ("PACS", "ERM"), ("VLCS", "LoRA"), ("VLCS", "ERM")]


def test_rows_of_one_algorithm_share_seeds_but_not_folders() -> None:
    rows = [
        {"algorithm": "LoRA"},
        {"algorithm": "LoRA", "label": "LoRA, more", "hparams": {"lora_rank": 8}, "steps": 3},
    ]
    jobs = jobs_of(rows=rows, n_trials=1, single_test_envs=True)
    assert [j.args["seed"] for j in jobs[:4]] == [j.args["seed"] for j in jobs[4:]]
    assert len({j.folder for j in jobs}) == 8
    assert "label" not in jobs[0].args and jobs[4].args["label"] == "LoRA, more"
    assert jobs[4].args["hparams"] == '{"lora_rank": 8}' and jobs[4].args["steps"] == 3
    assert jobs[4].describe(State.DONE) == f"Done: {jobs[4].folder} ('PACS', 'LoRA, more', [0], 0)"


def test_a_row_may_have_more_or_fewer_trials() -> None:
    rows = [{"algorithm": "LoRA", "n_trials": 2}, {"algorithm": "ERM"}]
    spec = spec_of(rows=rows, n_trials=1, n_trials_from=5, n_hparams=1, test_envs=[[0]])
    trials = [(job.args["algorithm"], job.args["trial_seed"]) for job in make_jobs(spec, spec.rows)]
    assert trials == [("LoRA", 5), ("ERM", 5), ("LoRA", 6)]
    assert [row["n_trials"] for row in describe_sweep(spec, spec.rows)["rows"]] == [2, 1]
    with pytest.raises(UsageError, match="n_trials of LoRA: got 0"):
        spec_of(rows=[{"algorithm": "LoRA", "n_trials": 0}])


def test_a_choice_brings_its_hparams(stubs: Path) -> None:
    rows = [{"algorithm": "ERM", "hparams": {"average": "sma"}}, {"algorithm": "LoRA"}]
    erm, lora = resolve_rows(spec_of(rows=rows, hparams={"average_start": 5}))
    assert erm.hparams == {"average": "sma", "average_start": 5} and lora.hparams == {}
    with pytest.raises(UsageError, match="unknown hparam 'average_start'"):
        resolve_rows(spec_of(rows=rows[1:], hparams={"average_start": 5}))


def test_hparams_of_an_algorithm_go_to_its_rows_that_know_them() -> None:
    rows = [{"algorithm": "FrozenCLIP", "label": p, "hparams": {"prompt": p}} for p in ("coop", "random")]
    general = {"clip_model": "mini", "clip_pretrained": "shapes"}
    spec = spec_of(rows=rows, hparams={**general, "FrozenCLIP": {"prompt_tokens": 4}})
    assert [row.hparams.get("prompt_tokens") for row in resolve_rows(spec)] == [4, None]
    with pytest.raises(UsageError, match="coop on .*unknown hparam of FrozenCLIP 'prompt_token'"):
        resolve_rows(spec_of(rows=rows, hparams={**general, "FrozenCLIP": {"prompt_token": 4}}))


def test_a_missing_choice_is_named() -> None:
    rows = [{"algorithm": "ERM", "hparams": {"average_start": 5}}]
    with pytest.raises(UsageError, match="'average_start'.*It comes with average=sma$"):
        resolve_rows(spec_of(rows=rows))
    rows = [{"algorithm": "ERM", "label": "mean", "hparams": {"average": "smaa"}}]
    with pytest.raises(UsageError, match="^mean: unknown average 'smaa'. Did you mean 'sma'"):
        resolve_rows(spec_of(rows=rows))


def test_swad_without_validation_images_is_refused_before_any_job() -> None:
    rows = [{"algorithm": "ERM", "hparams": {"average": "swad"}}]
    resolve_rows(spec_of(rows=rows))
    with pytest.raises(UsageError, match="average=swad needs validation images"):
        resolve_rows(spec_of(rows=rows, holdout_fraction=0.0))
    with pytest.raises(UsageError, match="swad_tolerance: got 2, expected at least swad_converge, 3"):
        resolve_rows(spec_of(rows=[{"algorithm": "ERM", "hparams": {"average": "swad", "swad_tolerance": 2}}]))


def test_the_flag_for_trials_is_for_all_rows(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'output_dir = "a"\ndatasets = ["PACS"]\n[[rows]]\nalgorithm = "ERM"\nn_trials = 5\n'
    )
    assert spec_from(str(tmp_path / "s.toml"), {}).rows[0].n_trials == 5
    assert spec_from(str(tmp_path / "s.toml"), {"n_trials": 1}).rows[0].n_trials is None


def test_later_hparams_win_and_general_ones_go_to_who_knows_them(stubs: Path) -> None:
    spec = spec_of(
        rows=[
            {"algorithm": "ERM"},
            {"algorithm": "LoRA"},
            {"algorithm": "LoRA", "label": "LoRA 9", "hparams": {"lr": 9}},
        ],
        hparams={"lora_rank": 2, "lr": 1, "LoRA": {"lr": 5}},
    )
    assert [row.hparams for row in resolve_rows(spec)] == [
        {"lr": 1},
        {"lora_rank": 2, "lr": 5},
        {"lora_rank": 2, "lr": 9},
    ]


def test_flags_win_over_the_file(stubs: Path) -> None:
    Path("s.toml").write_text(
        'output_dir = "a"\ndatasets = ["PACS"]\nn_trials = 5\ntest_envs = [[0, 1]]\n'
        '[[rows]]\nalgorithm = "LoRA"\nhparams = { lora_rank = 1 }\n'
        '[[rows]]\nalgorithm = "HeadPurification"\n'
    )
    flags = {"output_dir": "b", "n_trials": 2, "single_test_envs": True, "algorithms": ["ERM", "LoRA"]}
    spec = spec_from("s.toml", flags | {"hparams": '{"lora_rank": 3, "lr": 0.5}'})
    assert (spec.output_dir, spec.n_trials, spec.test_envs) == ("b", 2, ())
    assert resolve_rows(spec) == (Row("LoRA", hparams={"lora_rank": 3, "lr": 0.5}), Row("ERM", hparams={"lr": 0.5}))


DEBUG = ["--output_dir", "out", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1"]


def folders_of(commands: list[list[str]]) -> set[Path]:
    return {Path(command[command.index("--output_dir") + 1]) for command in commands}


def leave(job: Job, state: State) -> None:
    """The files of a run in that state; a running one is another machine's."""
    job.folder.mkdir(parents=True)
    (job.folder / "out.txt").write_text("Environment:")
    files = {
        State.DONE: (run_dir.DONE, "done"),
        State.FAILED: (run_dir.ERROR, "Traceback\n  ...\nOSError: disk full\n"),
        State.RUNNING: (run_dir.LOCK, REMOTE_LEASE),
    }
    if state in files:
        name, text = files[state]
        (job.folder / name).write_text(text)


@pytest.fixture
def one_of_each(stubs: Path, capsys: pytest.CaptureFixture[str]) -> dict[State, Job]:
    """A sweep of five states and a second job that is not launched."""
    spec = spec_of(datasets=["Debug28"], n_trials=1)
    jobs = make_jobs(spec, spec.rows)
    states = [State.DONE, State.RUNNING, State.FAILED, State.INCOMPLETE]
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == 0
    for job in jobs:
        job.folder.rmdir()
    for job, state in zip(jobs, states, strict=False):
        leave(job, state)
    capsys.readouterr()
    return dict(zip([*states, State.NOT_LAUNCHED], jobs, strict=False))


def test_dummy_end_to_end(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DomainBed's own test, but that incomplete jobs are launched without being deleted first."""

    def lines(command: str, *more: str) -> int:
        assert run(script.main, [command, *DEBUG, "--command_launcher", "dummy", *more]) == 0
        return sum(line.startswith("Dummy launcher:") for line in capsys.readouterr().out.splitlines())

    assert lines("launch") == 6
    assert lines("launch") == 6
    assert lines("delete_incomplete", "--skip_confirmation") == 0
    assert not [job for job in load_jobs(Path("out")) if job.folder.exists()]
    assert lines("launch") == 6


def test_status(one_of_each: dict[State, Job], capsys: pytest.CaptureFixture[str]) -> None:
    folders = {state: job.folder for state, job in one_of_each.items()}
    os.utime(folders[State.DONE] / "done", (time.time() - 60,) * 2)
    assert run(script.main, ["status", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Failed: {folders[State.FAILED]} ('Debug28', 'ERM', [0, 2], 0): OSError: disk full",
        "6 jobs: 1 done, 1 running, 1 failed, 1 incomplete, 2 not launched.",
        "Running; the rate is known once one is done.",
    ]
    assert run(script.main, ["status", "--output_dir", "out", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == [*map(str, folders), "Not launched"]
    assert lines[0] == f"Done: {folders[State.DONE]} ('Debug28', 'ERM', [0], 0)"


def test_status_for_machines(one_of_each: dict[State, Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script.main, ["status", "--output_dir", "out", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert {name: status[name] for name in ("total", "done", "running", "failed", "incomplete", "not_launched")} == {
        "total": 6, "done": 1, "running": 1, "failed": 1, "incomplete": 1, "not_launched": 2
    }  # fmt: skip
    failed = status["jobs"][2]
    assert failed["state"] == "failed" and failed["error"] == "OSError: disk full"
    assert failed["folder"] == str(one_of_each[State.FAILED].folder) and failed["args"]["test_envs"] == [0, 2]


def test_launch_starts_what_is_not_launched_or_incomplete(
    one_of_each: dict[State, Job], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script.main, ["launch", *DEBUG, "--skip_confirmation"]) == 1, "one is failed, and stays"
    left_alone = {one_of_each[state].folder for state in (State.DONE, State.RUNNING, State.FAILED)}
    assert len(launched[0]) == 3 and not folders_of(launched[0]) & left_alone
    out, err = capsys.readouterr()
    assert "About to launch 3 jobs. 1 of them continue where they stopped." in out
    assert "1 of 6 jobs failed:\nFailed: " in err and "OSError: disk full" in err
    assert f"launch {' '.join(DEBUG)} --skip_confirmation --retry_failed\n" in err


def test_retry_failed(one_of_each: dict[State, Job], launched: list[Any]) -> None:
    run(script.main, ["launch", *DEBUG, "--skip_confirmation", "--retry_failed"])
    assert len(launched[0]) == 4 and one_of_each[State.FAILED].folder in folders_of(launched[0])


def test_local_end_to_end(stubs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["launch", *DEBUG, "--algorithms", "LoRA", "ERM", "--single_test_envs", "--skip_confirmation"]
    assert run(script.main, argv) == 1
    out, err = capfd.readouterr()
    assert "6 jobs: 0 done, 0 incomplete, 6 not launched." in out
    assert "3 of 6 jobs failed:" in err and err.count("RuntimeError: LoRA is broken") == 6
    jobs = load_jobs(Path("out"))
    assert [job.state for job in jobs] == [State.FAILED] * 3 + [State.DONE] * 3
    assert json.loads((jobs[3].folder / "argv.jsonl").read_text()) == jobs[3].command[3:]

    Path("repaired").touch()
    assert run(script.main, argv) == 1, "failed jobs are not tried again by themselves"
    assert [job.state for job in jobs] == [State.FAILED] * 3 + [State.DONE] * 3
    assert run(script.main, [*argv, "--retry_failed"]) == 0
    assert [job.state for job in jobs] == [State.DONE] * 6
    assert capfd.readouterr().out.endswith("--input_dir out\n")


LAUNCHER = """
import sys
from test_sweep import StubERM
from domainbed_hp import registry
from domainbed_hp.sweep import jobs
from domainbed_hp.scripts import run, sweep

registry.ALGORITHMS["ERM"] = "test_sweep:StubERM"
jobs.TRAIN_MODULE = "stub_train"
sys.exit(run(sweep.main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_launchers_run_no_job_twice(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/sweep")]))
    argv = ["launch", *DEBUG, "--n_hparams", "10", "--n_trials", "2", "--test_envs", "0", "1"]
    command = [sys.executable, "-c", LAUNCHER, *argv, "--max_parallel", "2", "--skip_confirmation"]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [launcher.communicate() for launcher in two]
    assert [launcher.returncode for launcher in two] == [0, 0], ends
    jobs = load_jobs(Path("out"))
    assert Counter(job.state for job in jobs) == {State.DONE: 40}
    assert {len((job.folder / "argv.jsonl").read_text().splitlines()) for job in jobs} == {1}
    assert not [err for _, err in ends if "failed" in err]
    counts = [int(out.split("Launched ")[1].split()[0]) for out, _ in ends]
    assert sum(counts) == 40 and min(counts) > 0


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (run_dir.EXIT_TAKEN, 0, "Launched 5 jobs! 1 were taken by another launcher.\n"),
        (-9, 1, "1 jobs stopped before they were done:\nexit code -9: Not launched: "),
        (143, 1, "exit code 143: Not launched: "),
    ],
)
def test_how_jobs_end(
    stubs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    exit_code: int,
    message: str,
) -> None:
    monkeypatch.setitem(registry.LAUNCHERS, "dummy", lambda commands: [0, code, 0, 0, 0, 0])
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == exit_code
    assert message in "".join(capsys.readouterr())


def test_sweep_file_keeps_what_earlier_launches_left(stubs: Path) -> None:
    for algorithm in ["ERM", "LoRA", "ERM"]:
        assert run(script.main, ["launch", *DEBUG, "--algorithms", algorithm, "--command_launcher", "dummy"]) == 0
    saved = json.loads(Path("out/sweep.json").read_text())
    assert [row["label"] for row in saved["rows"]] == ["ERM", "LoRA"]
    assert len(saved["jobs"]) == 12
    assert saved["rows"][0] == {"algorithm": "ERM", "label": "ERM", "hparams": {}}
    assert [path.name for path in Path("out").iterdir() if path.is_file()] == ["sweep.json"]


def test_delete_incomplete_spares_what_is_running(
    one_of_each: dict[State, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script.main, ["delete_incomplete", "--output_dir", "out", "--skip_confirmation"]) == 0
    out = capsys.readouterr().out
    assert "About to delete 2 jobs.\nDeleted 2 jobs! 1 are running and were not deleted.\n" in out
    left = {state for state, job in one_of_each.items() if job.folder.exists()}
    assert left == {State.DONE, State.RUNNING}


def test_delete_incomplete_spares_a_job_that_starts_meanwhile(
    one_of_each: dict[State, Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = one_of_each[State.INCOMPLETE]
    shutil.rmtree(one_of_each[State.RUNNING].folder)
    with run_dir.RunLock(job.folder):
        monkeypatch.setattr(Job, "state", State.INCOMPLETE)
        assert run(script.main, ["delete_incomplete", "--output_dir", "out", "--skip_confirmation"]) == 0
        assert (job.folder / "out.txt").exists()
    assert (one_of_each[State.DONE].folder / "done").exists()
    assert "2 are running and were not deleted" in capsys.readouterr().out


def test_delete_incomplete_spares_jobs_that_the_flags_do_not_name(stubs: Path) -> None:
    for algorithm in ["ERM", "LoRA"]:
        assert run(script.main, ["launch", *DEBUG, "--algorithms", algorithm, "--command_launcher", "dummy"]) == 0
    assert run(script.main, ["delete_incomplete", *DEBUG, "--skip_confirmation"]) == 0
    left = {job.args["algorithm"] for job in load_jobs(Path("out")) if job.state == State.INCOMPLETE}
    assert left == {"LoRA"}


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_dry_run_writes_nothing(
    one_of_each: dict[State, Job], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (one_of_each[State.DONE].folder / "results.jsonl").write_text('{"elapsed_s": 600.0}\n')
    before = snapshot(Path())
    assert run(script.main, ["launch", *DEBUG, "--dry_run"]) == 0, "and asks nothing"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["Incomplete", "Not launched", "Not launched"]
    assert lines[-2] == "Would launch 3 jobs."
    assert (
        "Cost: about 30 min" in lines[-1] and "1 finished jobs; 3 from jobs of the same row and data set" in lines[-1]
    )
    assert run(script.main, ["launch", *DEBUG, "--dry_run", "--retry_failed", "--output_dir", "new/sweep"]) == 0
    assert "No estimate" in capsys.readouterr().out
    assert snapshot(Path()) == before and not launched


@pytest.mark.parametrize(
    "argv", [["delete_incomplete", "--dry_run"], ["launch", "--json"], ["status", "--retry_failed"]]
)
def test_a_flag_of_another_command(stubs: Path, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert run(script.main, argv) == 2
    assert f"{argv[1]} is a flag of" in capsys.readouterr().err


def test_only_launcher_options_that_were_given_are_passed(stubs: Path, launched: list[Any]) -> None:
    assert run(script.main, ["launch", *DEBUG, "--max_parallel", "4", "--skip_confirmation"]) == 0
    assert launched[1] == {"max_parallel": 4}


def test_a_file_s_launcher_options_are_for_its_launcher(
    stubs: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.toml").write_text("max_parallel = 3\n" + FEW + FILE)
    assert run(script.main, ["launch", "--config", "s.toml", "--skip_confirmation"]) == 0
    assert launched[1]["max_parallel"] == 3
    assert run(script.main, ["launch", "--config", "s.toml", "--command_launcher", "dummy"]) == 0
    assert run(script.main, ["launch", "--config", "s.toml", "--command_launcher", "dummy", "--max_parallel", "3"]) == 2
    assert "unknown option of launcher dummy 'max_parallel'. Known: none" in capsys.readouterr().err


def test_slurm_options(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def launch(commands: list[list[str]], **options: Any) -> list[int]:
        given.update(options)
        return [0] * len(commands)

    monkeypatch.setitem(registry.LAUNCHERS, "dummy", launch)
    Path("s.toml").write_text(
        'launcher = "dummy"\nslurm = { partition = "gpu", mem = "4GB", time = 60, exclusive = true }\n' + FEW + FILE
    )
    assert run(script.main, ["launch", "--config", "s.toml", "--slurm", "mem=8GB", "export=A=1"]) == 0
    assert given == {"slurm": {"partition": "gpu", "mem": "8GB", "time": "60", "exclusive": "true", "export": "A=1"}}


CLUSTER = """
from pathlib import Path

def launch(commands, queue: str = "long", retries: int | None = None, quiet: bool = False) -> list[int]:
    Path("launched").write_text(f"{len(commands)} {queue!r} {retries!r} {quiet!r}")
    return [0] * len(commands)

LAUNCHERS = {"my_cluster": launch}
"""


def test_a_launcher_of_ones_own_with_options(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "LAUNCHERS", registry.LAUNCHERS.copy())
    monkeypatch.syspath_prepend(stubs)
    monkeypatch.delitem(sys.modules, "cluster", raising=False)
    Path("cluster.py").write_text(CLUSTER)
    Path("s.toml").write_text(
        'launcher = "my_cluster"\nimports = ["cluster"]\nlauncher_options = { retries = 2, queue = "night" }\n'
        + FEW
        + FILE
    )
    argv = ["launch", "--config", "s.toml", "--skip_confirmation"]
    assert run(script.main, argv) == 0
    assert Path("launched").read_text() == "6 'night' 2 False"
    assert run(script.main, [*argv, "--launcher_options", "retries=3", "quiet=true"]) == 0
    assert Path("launched").read_text() == "6 'night' 3 True"
    flags = ["launch", *DEBUG, "--skip_confirmation", "--import", "cluster", "--command_launcher", "my_cluster"]
    assert run(script.main, flags) == 0
    assert Path("launched").read_text() == "6 'long' None False"
    Path("launched").unlink()
    for option, message in {
        "retries=many": "launcher option retries: got 'many', expected int",
        "quiet=1": "launcher option quiet: got 1, expected bool",
        "retry=1": "option of launcher my_cluster 'retry'. Did you mean 'retries'? Known: queue, retries, quiet",
        "retries": "--launcher_options retries: expected KEY=VALUE",
    }.items():
        assert run(script.main, [*flags, "--launcher_options", option]) == 2
        assert message in capsys.readouterr().err
    assert run(script.main, [*flags, "--max_parallel", "2"]) == 2
    assert "unknown option of launcher my_cluster 'max_parallel'" in capsys.readouterr().err
    assert run(script.main, [*argv, "--command_launcher", "dummy"]) == 0, "the file's options are for its launcher"
    assert not Path("launched").exists()


def test_an_option_by_its_own_flag_or_among_all_is_the_same(stubs: Path, launched: list[Any]) -> None:
    for flags in (["--max_parallel", "2"], ["--launcher_options", "max_parallel=2"]):
        assert run(script.main, ["launch", *DEBUG, "--skip_confirmation", *flags]) == 0
        assert launched[-1] == {"max_parallel": 2}


def test_slurm_options_are_words(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["launch", *DEBUG, "--command_launcher", "slurm", "--launcher_options", "slurm=x", "--skip_confirmation"]
    assert run(script.main, argv) == 2
    assert "launcher option slurm: got 'x', expected Mapping" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"slurm.mem: got \[1\], expected a word or a number"):
        spec_of(slurm={"mem": [1]})


def test_test_envs_and_trials_as_flags() -> None:
    flags = {"datasets": ["PACS"], "algorithms": ["ERM"], "output_dir": "out", "n_hparams": 1}
    spec = spec_from(None, flags | {"test_envs": ["3", "0,2"], "n_trials": 2, "n_trials_from": 5})
    order = [(job.args["trial_seed"], job.args["test_envs"]) for job in make_jobs(spec, spec.rows)]
    assert order == [(5, [3]), (5, [0, 2]), (6, [3]), (6, [0, 2])]


def test_domain_adaptation_in_a_sweep() -> None:
    (job,) = jobs_of(task="domain_adaptation", uda_holdout_fraction=0.5, test_envs=[[0]], n_trials=1)
    assert "--uda_holdout_fraction 0.5" in " ".join(job.command)


def test_a_question_that_nobody_can_answer(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run(script.main, ["launch", *DEBUG]) == 2
    assert "--skip_confirmation" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)  # closed by the shell
    assert run(script.main, ["launch", *DEBUG]) == 2
    assert "--skip_confirmation" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_end_of_the_input_is_a_no(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert run(script.main, ["launch", *DEBUG]) == 0
    assert capsys.readouterr().out.endswith("Nevermind!\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(("answer", "started"), [("Yes", True), ("n", False), ("", False)])
def test_confirmation(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, launched: list[Any], answer: str, started: bool
) -> None:
    questions = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or answer)
    assert run(script.main, ["launch", *DEBUG]) == 0
    assert questions == ["Are you sure? (y/n) "]
    assert Path("out").exists() == bool(launched) == started


def test_an_interrupted_sweep_says_how_to_go_on(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(commands: list[list[str]]) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setitem(registry.LAUNCHERS, "dummy", interrupted)
    argv = ["launch", *DEBUG, "--command_launcher", "dummy"]
    assert run(script.main, argv) == 130
    err = capsys.readouterr().err
    assert "6 not launched. Incomplete ones continue from the state that they saved.\n" in err
    assert f"To continue: python -m domainbed_hp.scripts.sweep {' '.join(argv)}\n" in err
    leave(load_jobs(Path("out"))[0], State.RUNNING)
    assert run(script.main, argv) == 130
    assert "1 running, 0 incomplete, 5 not launched. 1 are still running." in capsys.readouterr().err, (
        "as after the slurm launcher"
    )


FILE = 'output_dir = "out"\ndatasets = ["Debug28"]\n[[rows]]\nalgorithm = "ERM"\n'
FEW = "n_trials = 1\nn_hparams = 1\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--algorithms", "ERN"], "unknown algorithm 'ERN'. Did you mean 'ERM'?"),
        (["--datasets", "Debug29"], "unknown dataset 'Debug29'. Did you mean 'Debug28'?"),
        (["--command_launcher", "locale"], "unknown launcher 'locale'. Did you mean 'local'?"),
        (["--hparams", '{"lrr": 1}'], "unknown hparam 'lrr'. Did you mean 'lr'? Known: average, lr"),
        (["--hparams", '{"lr": "big"}'], "hparam lr: got 'big'"),
        (["--hparams", "{"], "not valid JSON"),
        (["--hparams", '{"ERM": {"lr": 1}}'], "expected a JSON object of names and values"),
        (["--datasets", "PACS"], "PACS is read from disk: pass --data_dir"),
        (["--datasets", "PACS", "--data_dir", "nowhere"], "nowhere"),
        (["--n_trials", "0"], "no jobs: n_trials 0"),
        (["--n_hparams_from", "1"], "no jobs"),
        (["--max_parallel", "0"], "max_parallel: got 0"),
        (["--steps", "0"], "steps: got 0, expected at least 1"),
        (["--checkpoint_freq", "0"], "checkpoint_freq: got 0"),
        (["--eval_images", "-1"], "eval_images: got -1"),
        (
            ["--jobs_per_gpu", "2"],
            "unknown option of launcher local 'jobs_per_gpu'. Known: max_p",
        ),
        (["--slurm", "partition"], "--slurm partition: expected KEY=VALUE"),
        (["--test_envs", "a"], "--test_envs a: expected numbers"),
        (["--test_envs", "3"], "Debug28 has the environments 0 to 2"),
        (["--n_trials_from", "-1"], "no jobs: n_trials 1 from -1"),
        (["--task", "domain_adaptation"], "needs uda_holdout_fraction"),
        (["--datasets", "Debug28", "Debug28"], "the same job twice"),
        (["--import", "no_such_module"], "--import no_such_module"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: cannot be read"),
        (["--config", "broken.toml"], "--config broken.toml: not valid TOML"),
    ],
)
def test_mistakes_are_refused_before_any_folder_exists(
    stubs: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    Path("broken.toml").write_text("output_dir = ")
    before = set(stubs.iterdir())
    assert run(script.main, ["launch", *DEBUG, "--skip_confirmation", *argv]) == 2
    assert message in capsys.readouterr().err
    assert set(stubs.iterdir()) - {stubs / "__pycache__"} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: 'loader = "batched"\n' + t, "unknown key of --config s.toml: 'loader'"),
        (lambda t: 'precision = "fp16"\n' + t, "Known: fp32, bf16"),
        (lambda t: "n_trails = 1\n" + t, "unknown key of --config s.toml: 'n_trails'. Did you mean 'n_trials'?"),
        (lambda t: 'n_trials = "1"\n' + t, "n_trials is '1'; expected int"),
        (lambda t: "n_trials = true\n" + t, "n_trials is True; expected int"),
        (lambda t: "test_envs = [0]\n" + t, "expected a list of a list of int"),
        (lambda t: "test_envs = [[3]]\n" + t, "test_envs [3]: Debug28 has the environments 0 to 2"),
        (lambda t: "test_envs = [[0, 1, 2]]\n" + t, "leave no environment of Debug28 to train on"),
        (lambda t: t.replace("output_dir", "#"), "missing output_dir"),
        (lambda t: t + 'color = "red"\n', "unknown key of [[rows]]"),
        (lambda t: t + "hparams = 3\n", "expected dict"),
        (lambda t: t + "steps = 0\n", "steps of ERM: got 0, expected at least 1"),
        (lambda t: t + 'label = "LoRA"\n', "label 'LoRA' of ERM is another algorithm's name"),
        (lambda t: t + '[[rows]]\nalgorithm = "ERM"\n', "two rows are called 'ERM'"),
        (lambda t: t + "[[rows]]\n", "missing algorithm"),
        (lambda t: "rows = 3\n" + t.split("[[rows]]")[0], "write [[rows]] above each"),
        (lambda t: t.split("[[rows]]")[0], "rows must not be empty"),
        (lambda t: t + "hparams = { lora_rank = 1 }\n", "unknown hparam of ERM 'lora_rank'"),
        (lambda t: t + "[hparams]\nlora_rank = 1\n", "unknown hparam 'lora_rank'"),
        (lambda t: t + "[hparams.LoRA]\nlora_rank = 1\n", "unknown algorithm in [hparams] 'LoRA'"),
    ],
)
def test_mistakes_in_a_sweep_file(
    stubs: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], message: str
) -> None:
    Path("s.toml").write_text(change(FILE))
    assert run(script.main, ["launch", "--config", "s.toml", "--command_launcher", "dummy"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_two_environments_cannot_be_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    two = dataclasses.replace(registry.load(registry.DATASETS, "dataset", "Debug28"), environments=("0", "1"))
    monkeypatch.setitem(registry.DATASETS, "Debug28", two)
    with pytest.raises(UsageError, match="give --single_test_envs"):
        jobs_of(datasets=["Debug28"])
    assert len(jobs_of(datasets=["Debug28"], single_test_envs=True, n_trials=1)) == 2


def test_a_folder_of_ones_own_is_a_data_set(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("day/fox/1", "day/owl/1", "night/fox/1", "night/owl/1"):
        path = stubs / "data" / "mine" / f"{name}.png"
        path.parent.mkdir(parents=True)
        photo(20, 20).save(path)
    argv = ["launch", "--algorithms", "ERM", "--datasets", "folder:mine", "--data_dir", "data", "--output_dir", "out"]
    argv += ["--n_trials", "1", "--n_hparams", "1", "--single_test_envs", "--command_launcher", "dummy"]
    assert run(script.main, argv) == 0
    assert capsys.readouterr().out.count("--dataset folder:mine") == 2
    for path in (stubs / "data" / "mine" / "night").glob("owl/*"):
        path.unlink()
    assert run(script.main, argv) == 2
    assert "no images in" in capsys.readouterr().err


def test_where_data_lie_and_who_loads_them_is_not_the_identity() -> None:
    (plain,) = jobs_of(datasets=["Debug28"], n_trials=1, n_hparams=1, test_envs=[[0]])
    (moved,) = jobs_of(datasets=["Debug28"], n_trials=1, n_hparams=1, test_envs=[[0]], data_dir="x", num_workers=0)
    assert moved.folder == plain.folder and "--data_dir" in moved.command
    assert "--num_workers 0" in " ".join(moved.command)
    (other,) = jobs_of(datasets=["Debug28"], n_trials=1, n_hparams=1, test_envs=[[0]], precision="bf16")
    assert other.folder != plain.folder


def test_status_needs_a_sweep(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script.main, ["status"]) == 2
    assert "no sweep was launched into results/quickstart" in capsys.readouterr().err


def test_status_imports_nothing_heavy(stubs: Path) -> None:
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == 0
    code = (
        "import sys; from domainbed_hp.scripts.sweep import main; main(['status', '--output_dir', sys.argv[1]]);"
        "sys.exit(bool({'torch', 'pandas', 'open_clip', 'numpy', 'tqdm', 'tabulate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, stubs / "out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "6 jobs: 0 done, 6 incomplete, 0 not launched." in result.stdout


@pytest.mark.parametrize(
    ("count", "states", "seconds"),
    [(1000, [*State], 2), pytest.param(10_000, [State.DONE], 5, marks=pytest.mark.slow)],
)
def test_status_of_many_jobs_is_quick(stubs: Path, count: int, states: list[State], seconds: float) -> None:
    jobs = jobs_of(n_trials=count // 10)[:count]
    for i, job in enumerate(jobs):
        if (state := states[i % len(states)]) != State.NOT_LAUNCHED:
            leave(job, state)
    jobs_module.save_sweep(Path("out"), {"rows": []}, jobs, list_all=False)
    start = time.perf_counter()
    command = [sys.executable, "-m", "domainbed_hp.scripts.sweep", "status", "--output_dir", "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < seconds
    assert f"{count} jobs: {count // len(states)} done" in result.stdout


def test_launch_without_flags_is_the_quickstart(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(script.main, ["launch"]) == 0, "no question asked, although nobody could answer"
    assert Path("results/quickstart/sweep.json").exists()
    assert len(launched[0]) == 12
    assert run(script.main, ["status"]) == 0
    assert capsys.readouterr().out.endswith("12 jobs: 0 done, 0 incomplete, 12 not launched.\n")


# Number of jobs, and md5 of their names, one a line, as version 2e6c928 made them. Names must never change: what is
# done would be run again.
SWEEPS = {
    "quickstart": (12, "52cf2d4ef2ad61d7248683bdc102be1a"),
    "shapes": (180, "84485444e08f21dcb4fb72abe1e46e47"),
    "shapes_methods": (152, "91a9d784fa9768a653ea96023c171228"),
    "pacs": (20, "fb325000f49c2605bd22aa654ed58e22"),
    "main": (462, "70371f5c5d4ef6d237672a2a8cf51191"),
    "clip_baselines": (1848, "beb93aae9aecda3f596ea72f6810418d"),
    "combinations": (1188, "4607fdf55009683d79ae20b207011deb"),
}
UNRESOLVED = {  # their weights are in no package: the rows' own hparams alone
    "pacs_seen": (20, "5111276dfef6e0cbd1b07c91259a5dae"),
    "pacs_seen_methods": (152, "4db26d78d81785ba202ef98a9e6a3eff"),
}


@pytest.mark.parametrize("name", [*SWEEPS, *UNRESOLVED])
def test_jobs_of_the_sweep_files_have_the_names_that_they_always_had(name: str) -> None:
    path = ROOT / "sweeps" / f"{name}.toml"
    spec = SweepSpec.of(tomllib.loads(path.read_text()), path.name)
    rows = resolve_rows(spec) if name in SWEEPS else spec.rows
    names = [job.folder.name for job in make_jobs(spec, rows)]
    assert (len(names), hashlib.md5("\n".join(names).encode()).hexdigest()) == (SWEEPS | UNRESOLVED)[name]
    assert name in UNRESOLVED or all("clip_model" in row.hparams for row in rows)


def test_every_sweep_file_is_among_them() -> None:
    assert {path.stem for path in (ROOT / "sweeps").glob("*.toml")} == {*SWEEPS, *UNRESOLVED}


def test_a_job_with_all_arguments_has_the_name_that_it_always_had() -> None:
    where = {"data_dir": "d", "compile": "off", "device": "cpu", "features": "encode", "num_workers": 0}
    rest = {"checkpoint_freq": 3, "eval": "fast", "eval_images": 7, "precision": "fp32", "save": "full", "keep": "best"}
    rest |= {"task": "domain_adaptation", "holdout_fraction": 0, "uda_holdout_fraction": 0.5, "imports": ["a", "b"]}
    rows = [{"algorithm": "ERM", "label": "x", "steps": 3, "hparams": {"lr": 0.1}}]
    values = {"output_dir": "o", "datasets": ["Debug28"], "rows": rows, "n_trials": 1, "test_envs": [[0, 1]]}
    (job,) = jobs_of(**values, **where, **rest, skip_model_save=True)
    assert job.folder.name == "d0e4cc007fb124101160066af37a9b00"
    assert " ".join(job.command[2:]) == (
        "domainbed_hp.scripts.train --algorithm ERM --checkpoint_freq 3 --compile off --data_dir d --dataset Debug28 "
        '--device cpu --eval fast --eval_images 7 --features encode --holdout_fraction 0 --hparams {"lr": 0.1} '
        "--hparams_seed 0 --import a b --keep best --label x --num_workers 0 "
        "--output_dir o/d0e4cc007fb124101160066af37a9b00 --precision fp32 --save full --seed 2084338853 "
        "--skip_model_save --steps 3 --task domain_adaptation --test_envs 0 1 --trial_seed 0 --uda_holdout_fraction 0.5"
    )


def test_the_packaged_quickstart_is_the_one_in_sweeps() -> None:
    assert (ROOT / "sweeps/quickstart.toml").resolve() == ROOT / "domainbed_hp/sweep/quickstart.toml"
