import dataclasses
import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import photo

from domainbed_hp import registry, sweep
from domainbed_hp.algorithms.base import Pixels
from domainbed_hp.hparams_registry import HParam
from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run
from domainbed_hp.scripts import sweep as script
from domainbed_hp.sweep import Job, Row, SweepSpec, job_name, make_jobs, resolve_rows

ROOT = Path(__file__).parents[1]

# DomainBed's job folders and seeds of ERM on PACS, trial 0, hparams seed 0, test environments 0..3.
GOLDEN = [
    ("ccbf3907c0fcc2d6f6cfda345a14214b", 94828300),
    ("4b275eab2f2fc66601678f18d39d2f27", 970950204),
    ("a7c23c0b48e8a9ee5822dcec944784c1", 1164463227),
    ("00e49d8ab04cef391d4400afc7a872aa", 1592993),
]


class StubERM:
    @classmethod
    def hparams_for(cls, dataset: str) -> dict[str, HParam]:
        return {"lr": HParam(1e-3)}

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        pass

    @classmethod
    def pixels(cls, hparams: dict[str, Any], image_size: int) -> Pixels:
        return Pixels(image_size)


class StubLoRA(StubERM):
    @classmethod
    def hparams_for(cls, dataset: str) -> dict[str, HParam]:
        return {"lr": HParam(1e-3), "lora_rank": HParam(4)}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ERM and LoRA without torch, a `train` that only notes its arguments, and tmp_path as the current folder."""
    monkeypatch.setitem(registry.ALGORITHMS, "ERM", f"{__name__}:StubERM")
    monkeypatch.setitem(registry.ALGORITHMS, "LoRA", f"{__name__}:StubLoRA")
    (tmp_path / "stub_train.py").write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "if 'LoRA' in sys.argv: raise RuntimeError('LoRA is broken')\n"
        "(folder / 'argv.json').write_text(json.dumps(sys.argv[1:]))\n"
        "(folder / 'done').write_text('done')\n"
    )
    monkeypatch.setattr(sweep, "TRAIN_MODULE", "stub_train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec_of(**values: Any) -> SweepSpec:
    values = {"output_dir": "out", "datasets": ["PACS"], "rows": [{"algorithm": "ERM"}], "n_hparams": 1} | values
    return SweepSpec.of(values, "test")


def jobs_of(**values: Any) -> list[Job]:
    spec = spec_of(**values)
    return make_jobs(spec, spec.rows)


def test_domainbeds_job_names_and_seeds() -> None:
    jobs = jobs_of(data_dir="/my/datasets/path", n_trials=1, single_test_envs=True)
    assert [(job_name(job.args), job.args["seed"]) for job in jobs] == GOLDEN


def test_domainbeds_shipped_sweep(shared_data: Path) -> None:
    jobs = jobs_of(datasets=["VLCS"], data_dir="/checkpoint/dlp/datasets_new", n_trials=2, n_hparams=2, steps=1001)
    shipped = {path.parent.name for path in (shared_data / "domainbed_sweep").rglob("done")}
    assert len(shipped) == 40
    assert {job_name(job.args) for job in jobs} == shipped


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


@pytest.mark.parametrize("change", [{"data_dir": "elsewhere/"}, {"device": "cuda:1"}, {"output_dir": "moved"}])
def test_where_a_job_runs_is_not_its_identity(change: dict[str, Any]) -> None:
    assert [j.folder.name for j in jobs_of(**change)] == [j.folder.name for j in jobs_of(data_dir="/data")]


@pytest.mark.parametrize("change", [{"steps": 7}, {"precision": "bf16"}, {"eval_images": 10}, {"holdout_fraction": 0}])
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
    assert "'LoRA, more', [0], 0)" in str(jobs[4])


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
    spec = script.spec_from("s.toml", flags | {"hparams": '{"lora_rank": 3, "lr": 0.5}'})
    assert (spec.output_dir, spec.n_trials, spec.test_envs) == ("b", 2, ())
    assert resolve_rows(spec) == (Row("LoRA", hparams={"lora_rank": 3, "lr": 0.5}), Row("ERM", hparams={"lr": 0.5}))


DEBUG = ["--output_dir", "out", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1"]


def test_dummy_end_to_end(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DomainBed's own test: 6 lines, then 0 because the jobs are launched, then 6 again after delete_incomplete."""

    def lines(command: str, *more: str) -> int:
        assert run(script.main, [command, *DEBUG, "--command_launcher", "dummy", *more]) == 0
        return sum(line.startswith("Dummy launcher:") for line in capsys.readouterr().out.splitlines())

    assert lines("launch") == 6
    assert lines("launch") == 0
    assert lines("delete_incomplete", "--skip_confirmation") == 0
    assert lines("launch") == 6


def test_states_and_summary(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == 0
    jobs = sweep.load_jobs(Path("out"))
    (jobs[0].folder / "done").write_text("done")
    jobs[1].folder.rmdir()
    capsys.readouterr()
    assert run(script.main, ["status", "--output_dir", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Done: {jobs[0].folder} ('Debug28', 'ERM', [0], 0)"
    assert lines[1] == f"Not launched: {jobs[1].folder} ('Debug28', 'ERM', [0, 1], 0)"
    assert lines[2] == f"Incomplete: {jobs[2].folder} ('Debug28', 'ERM', [0, 2], 0)"
    assert lines[-1] == "6 jobs: 1 done, 4 incomplete, 1 not launched."


def test_local_end_to_end(stubs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["launch", *DEBUG, "--algorithms", "LoRA", "ERM", "--single_test_envs", "--skip_confirmation"]
    assert run(script.main, argv) == 1
    out, err = capfd.readouterr()
    assert "6 jobs: 0 done, 0 incomplete, 6 not launched." in out
    assert err.count("    RuntimeError: LoRA is broken") == 3
    assert "3 of 6 jobs failed:" in err
    jobs = sweep.load_jobs(Path("out"))
    assert [job.state for job in jobs] == [Job.INCOMPLETE] * 3 + [Job.DONE] * 3
    assert json.loads((jobs[3].folder / "argv.json").read_text()) == jobs[3].command[3:]

    assert run(script.main, argv) == 0, "nothing is left to launch, so nothing fails"
    assert "3 incomplete jobs are not launched again before: " in capfd.readouterr().err


def test_sweep_file_keeps_what_earlier_launches_left(stubs: Path) -> None:
    for algorithm in ["ERM", "LoRA", "ERM"]:
        assert run(script.main, ["launch", *DEBUG, "--algorithms", algorithm, "--command_launcher", "dummy"]) == 0
    saved = json.loads(Path("out/sweep.json").read_text())
    assert [row["label"] for row in saved["rows"]] == ["ERM", "LoRA"]
    assert len(saved["jobs"]) == 12
    assert saved["rows"][0] == {"algorithm": "ERM", "label": "ERM", "hparams": {}}
    assert [path.name for path in Path("out").iterdir() if path.is_file()] == ["sweep.json"]


def test_delete_incomplete_spares_jobs_that_the_flags_do_not_name(stubs: Path) -> None:
    for algorithm in ["ERM", "LoRA"]:
        assert run(script.main, ["launch", *DEBUG, "--algorithms", algorithm, "--command_launcher", "dummy"]) == 0
    assert run(script.main, ["delete_incomplete", *DEBUG, "--skip_confirmation"]) == 0
    left = {job.args["algorithm"] for job in sweep.load_jobs(Path("out")) if job.state == Job.INCOMPLETE}
    assert left == {"LoRA"}


def test_a_question_that_nobody_can_answer(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run(script.main, ["launch", *DEBUG]) == 2
    assert "--skip_confirmation" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(("answer", "launched"), [("Yes", True), ("n", False), ("", False)])
def test_confirmation(stubs: Path, monkeypatch: pytest.MonkeyPatch, answer: str, launched: bool) -> None:
    questions = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or answer)
    assert run(script.main, ["launch", *DEBUG]) == 0
    assert questions == ["Are you sure? (y/n) "]
    assert Path("out").exists() == launched


def test_an_interrupted_sweep_says_how_to_go_on(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(commands: list[list[str]]) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr("domainbed_hp.launchers.dummy.launch", interrupted)
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == 130
    assert "delete_incomplete --output_dir out" in capsys.readouterr().err


FILE = 'output_dir = "out"\ndatasets = ["Debug28"]\n[[rows]]\nalgorithm = "ERM"\n'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--algorithms", "ERN"], "unknown algorithm 'ERN'. Did you mean 'ERM'?"),
        (["--datasets", "Debug29"], "unknown dataset 'Debug29'. Did you mean 'Debug28'?"),
        (["--command_launcher", "locale"], "unknown launcher 'locale'. Did you mean 'local'?"),
        (["--hparams", '{"lrr": 1}'], "unknown hparam 'lrr'. Did you mean 'lr'? Known: lr"),
        (["--hparams", '{"lr": "big"}'], "hparam lr: got 'big'"),
        (["--hparams", "{"], "not valid JSON"),
        (["--hparams", '{"ERM": {"lr": 1}}'], "expected an object of names and values"),
        (["--datasets", "PACS"], "PACS is read from disk: pass --data_dir"),
        (["--datasets", "PACS", "--data_dir", "nowhere"], "nowhere"),
        (["--n_trials", "0"], "no jobs: n_trials 0"),
        (["--n_hparams_from", "1"], "no jobs"),
        (["--max_parallel", "0"], "max_parallel is 0"),
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
        (lambda t: 'loader = "batch"\n' + t, "'batch'. Did you mean 'batched'? Known: batched, reference"),
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
        (lambda t: t + 'label = "Mine"\n', "label 'Mine' must start with its algorithm, 'ERM'"),
        (lambda t: t + '[[rows]]\nalgorithm = "ERM"\n', "two rows are called 'ERM'"),
        (lambda t: t + "[[rows]]\n", "missing algorithm"),
        (lambda t: "rows = 3\n" + t.split("[[rows]]")[0], "write [[rows]] above each"),
        (lambda t: t.split("[[rows]]")[0], "rows must not be empty"),
        (lambda t: t + "hparams = { lora_rank = 1 }\n", "unknown hparam of ERM 'lora_rank'"),
        (lambda t: t + "[hparams]\nlora_rank = 1\n", "unknown hparam 'lora_rank'"),
        (lambda t: t + "[hparams.LoRA]\nlora_rank = 1\n", "unknown algorithm with [hparams] of its own 'LoRA'"),
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
    monkeypatch.setattr("domainbed_hp.datasets.debug.DEBUG28", two)
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
    (other,) = jobs_of(datasets=["Debug28"], n_trials=1, n_hparams=1, test_envs=[[0]], loader="reference")
    assert other.folder != plain.folder


def test_status_needs_a_sweep(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script.main, ["status"]) == 2
    assert "no sweep was launched into results/quickstart" in capsys.readouterr().err


def test_status_imports_no_torch(stubs: Path) -> None:
    assert run(script.main, ["launch", *DEBUG, "--command_launcher", "dummy"]) == 0
    code = (
        "import sys; from domainbed_hp.scripts.sweep import main; main(['status', '--output_dir', sys.argv[1]]);"
        "sys.exit(bool({'torch', 'pandas', 'open_clip'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, stubs / "out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "6 jobs: 0 done, 6 incomplete, 0 not launched." in result.stdout


def test_launch_without_flags_is_the_quickstart(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    launched: list[list[str]] = []
    monkeypatch.setattr(
        "domainbed_hp.launchers.local.launch", lambda commands: [launched.append(c) or 0 for c in commands]
    )
    assert run(script.main, ["launch"]) == 0, "no question asked, although nobody could answer"
    assert Path("results/quickstart/sweep.json").exists()
    assert len(launched) == 12
    assert run(script.main, ["status"]) == 0
    assert capsys.readouterr().out.endswith("12 jobs: 0 done, 0 incomplete, 12 not launched.\n")


@pytest.mark.parametrize(("name", "count"), [("quickstart", 12), ("shapes", 180), ("pacs", 20), ("main", 462)])
def test_sweep_files_hold_what_the_algorithms_know(name: str, count: int) -> None:
    path = ROOT / "sweeps" / f"{name}.toml"
    spec = SweepSpec.of(tomllib.loads(path.read_text()), path.name)
    rows = resolve_rows(spec)
    assert len(make_jobs(spec, rows)) == count
    assert all("clip_model" in row.hparams for row in rows)


def test_the_packaged_quickstart_is_the_one_in_sweeps() -> None:
    assert (ROOT / "sweeps/quickstart.toml").resolve() == ROOT / "domainbed_hp/sweeps/quickstart.toml"
