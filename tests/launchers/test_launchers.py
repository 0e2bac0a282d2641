import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domainbed_hp import run_dir
from domainbed_hp.launchers import dummy, local, multi_gpu, slurm
from domainbed_hp.launchers.processes import LOG
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def child(code: str, folder: Path, *args: object) -> list[str]:
    """argv of a Python process that runs `code`; its arguments begin at sys.argv[3]."""
    return [sys.executable, "-c", textwrap.dedent(code), "--output_dir", str(folder), *map(str, args)]


# Each of two waits for the other: only when both run at once do they end.
MEET = """
    import os, pathlib, sys, time
    mine, other = map(pathlib.Path, sys.argv[3:5])
    mine.write_text(os.environ["OMP_NUM_THREADS"] + os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    for _ in range(400):
        if other.exists():
            sys.exit(0)
        time.sleep(0.05)
    sys.exit(1)
"""
# Fails where another one runs at the same time.
ALONE = """
    import os, sys, time
    name = sys.argv[3] + os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    time.sleep(0.1)
    os.remove(name)
"""


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)


def test_two_jobs_run_at_once_and_share_the_cores(tmp_path: Path, four_cores: None) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert local.launch([child(MEET, tmp_path / "1", a, b), child(MEET, tmp_path / "2", b, a)]) == [0, 0]
    assert (a.read_text(), b.read_text()) == ("2", "2")


def test_threads_set_by_the_user_stay(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.launch([child(MEET, tmp_path / "1", tmp_path / "a", tmp_path)]) == [0]
    assert (tmp_path / "a").read_text() == "7"


def test_cores_that_a_cluster_gave(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert local.launch([child(MEET, tmp_path / "1", tmp_path / "a", tmp_path)]) == [0]
    assert (tmp_path / "a").read_text() == "3"


def test_never_more_than_max_parallel(tmp_path: Path, four_cores: None) -> None:
    commands = [child(ALONE, tmp_path / str(i), tmp_path / "lock") for i in range(3)]
    assert local.launch(commands, max_parallel=1) == [0, 0, 0]
    assert local.launch(commands, max_parallel=3) != [0, 0, 0]


def test_no_commands() -> None:
    assert local.launch([]) == local.launch([], jobs_per_process=2) == dummy.launch([]) == multi_gpu.launch([]) == []


def test_a_job_without_a_folder_is_refused() -> None:
    with pytest.raises(UsageError, match="names its folder by --output_dir"):
        local.launch([["train", "--output_dir"]])


@pytest.mark.parametrize("options", [{"max_parallel": 0}, {"jobs_per_process": -1}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected at least 1"):
        local.launch([], **options)


@pytest.mark.parametrize("jobs_per_process", [1, 2])
def test_what_is_done_or_running_is_not_started(
    tmp_path: Path, jobs_per_process: int, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "done").write_text("done")
    commands = [child("raise RuntimeError", tmp_path / name) for name in ("done", "running")]
    with run_dir.claim(tmp_path / "running"):
        assert local.launch(commands, jobs_per_process=jobs_per_process) == [EXIT_TAKEN, EXIT_TAKEN]
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.rglob(LOG))


def test_a_job_that_another_launcher_has_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert local.launch([child("import sys; print('taken', file=sys.stderr); sys.exit(75)", tmp_path)]) == [EXIT_TAKEN]
    assert capfd.readouterr().err == ""


def test_a_failed_job_is_reported_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fail = "import sys; print('shown to nobody'); raise RuntimeError('the reason')"
    commands = [child(code, tmp_path / name) for name, code in [("bad", fail), ("good", "")]]
    assert local.launch(commands, max_parallel=1) == [1, 0]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"failed with exit code 1: {tmp_path / 'bad'}"
    assert err.splitlines()[1] == f"    RuntimeError: the reason (all of it: {tmp_path / 'bad' / LOG})"
    assert "Traceback" in (tmp_path / "bad" / LOG).read_text()
    assert list((tmp_path / "good").iterdir()) == []


@pytest.mark.parametrize("jobs_per_process", [1, 2])
def test_a_folder_that_cannot_be_made_is_reported_and_the_others_go_on(
    stub: Path, jobs_per_process: int, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    commands = [job("a"), job("file/b"), job("file"), job("c")]
    assert local.launch(commands, 1, jobs_per_process) == [0, 1, 1, 0]
    reasons = ["file/b: cannot be written to: Not a directory", "file: cannot be written to: File exists"]
    assert capfd.readouterr().err.splitlines() == reasons


def test_the_reason_is_that_of_this_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for reason in ["the first", "the second"]:
        local.launch([child(f"import sys; sys.exit({reason!r})", tmp_path)])
    local.launch([child("import os; os._exit(3)", tmp_path)])
    lines = capfd.readouterr().err.splitlines()[1::2]
    assert lines == ["    the first", "    the second", "    it wrote nothing to stderr"]
    assert (tmp_path / LOG).read_text() == "the first\nthe second\n"


def test_the_reason_that_a_run_left_wins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
        import pathlib, sys
        (pathlib.Path(sys.argv[2]) / "err.txt").write_text("Traceback ...\\nValueError: loss is nan\\n")
        sys.exit("leaked semaphores")
    """
    local.launch([child(code, tmp_path)])
    assert capfd.readouterr().err.splitlines()[1] == "    ValueError: loss is nan"


def test_a_killed_job_has_a_negative_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert local.launch([child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)]) == [-9]
    assert capfd.readouterr().err == f"killed by SIGKILL: {tmp_path}\n    it wrote nothing to stderr\n"


@pytest.mark.parametrize(
    ("code", "how"), [(143, "sys.exit(128 + 15)"), (-15, "os.kill(os.getpid(), 15)")], ids=["saved", "not begun"]
)
def test_a_job_that_was_stopped_goes_on_later(
    tmp_path: Path, code: int, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert local.launch([child(f"import os, sys; {how}", tmp_path)]) == [code]
    assert capfd.readouterr().err == f"stopped by SIGTERM, goes on when it is launched again: {tmp_path}\n"


# A module with a `main`, for processes of its own and for workers.
STUB = """
import json, os, pathlib, signal, sys, textwrap, time
from domainbed_hp import registry
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import Taken
from domainbed_hp.scripts import run

def save(number, frame):
    with open("saved", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    raise SystemExit(128 + number)

def main(argv=None):
    folder, what = pathlib.Path(argv[1]), argv[2]
    (folder / "pid").write_text(str(os.getpid()))
    if what == "wait":
        signal.signal(signal.SIGTERM, save)
        os.chdir(folder)
        pathlib.Path("started").touch()
        time.sleep(600)
    exec("def body(folder):\\n" + textwrap.indent(what or "pass", "    "))
    return locals()["body"](folder) or 0

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def job(name: str, what: str = "") -> list[str]:
    return [sys.executable, "-m", "stub", "--output_dir", name, what]


@pytest.mark.slow
def test_a_worker_runs_several_jobs_and_is_replaced(stub: Path) -> None:
    names = list("abcde")
    assert local.launch([job(name) for name in names], max_parallel=1, jobs_per_process=2) == [0] * 5
    pids = [(stub / name / "pid").read_text() for name in names]
    assert [len(set(pids[:2])), len(set(pids[2:4])), len(set(pids))] == [1, 1, 3]


def test_a_worker_that_was_told_to_stop_gets_no_more_jobs(stub: Path) -> None:
    assert local.launch([job("a", "sys.exit(143)"), job("b")], max_parallel=1, jobs_per_process=2) == [143, 0]
    assert (stub / "a" / "pid").read_text() != (stub / "b" / "pid").read_text()


@pytest.mark.slow
def test_workers_beside_each_other(stub: Path, four_cores: None) -> None:
    meet = "import time\nfor _ in range(400):\n if pathlib.Path({other!r}, 'pid').exists(): return 0\n time.sleep(0.05)"
    commands = [job("a", meet.format(other="b") + "\nreturn 1"), job("b", meet.format(other="a") + "\nreturn 1")]
    assert local.launch(commands, max_parallel=2, jobs_per_process=5) == [0, 0]


ENDINGS = [
    "return 3",
    "sys.exit()",
    "sys.exit(4)",
    "sys.exit('words')",
    "raise UsageError('bad input')",
    "raise Taken('taken')",
    "raise RuntimeError('the reason')",
    "raise KeyboardInterrupt",
    "os._exit(5)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "raise SystemExit(143)",
    "print('not a code'); print(sys.stdin.read())",
    "os.write(2, b'from C')",
    "",
]


@pytest.mark.slow
def test_a_job_of_a_worker_ends_as_in_a_process_of_its_own(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def launch(prefix: str, jobs_per_process: int) -> tuple[list[int], list[str | None]]:
        commands = [job(f"{prefix}{i}", what) for i, what in enumerate(ENDINGS)]
        codes = local.launch(commands, max_parallel=2, jobs_per_process=jobs_per_process)
        logs = [Path(f"{prefix}{i}", LOG) for i in range(len(ENDINGS))]
        said = [log.read_text().strip().splitlines()[-1] if log.exists() else None for log in logs]
        return codes, said

    apart, together = launch("apart", 1), launch("together", 100)
    assert apart == together
    assert apart[0] == [3, 0, 4, 1, 2, 75, 1, -2, 5, -9, 143, 0, 0, 0]
    assert apart[1][3:7] == ["words", "error: bad input", "error: taken", "RuntimeError: the reason"]
    assert apart[1][-2:] == ["from C", None]
    assert "Traceback" in Path("together6", LOG).read_text()
    reports = [line.replace("apart", "together") for line in capfd.readouterr().err.splitlines()]
    half = len(reports) // 2
    assert sorted(reports[:half]) == sorted(reports[half:])


def test_nothing_leaks_from_one_job_to_the_next(stub: Path) -> None:
    show = """
import torch
found = [dict(os.environ), os.getcwd(), sys.path, signal.getsignal(signal.SIGTERM).name, sys.stdout is sys.__stdout__]
from torch.backends import cuda, cudnn, mkldnn
found += [registry.ALGORITHMS, registry.PROMPTS, registry.DATASETS]
found += [torch.get_num_threads(), str(torch.get_default_dtype())]
found += [torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.get_deterministic_debug_mode()]
found += [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32]
found += [cudnn.conv.fp32_precision, mkldnn.matmul.fp32_precision, str(torch.empty(0).device)]
(folder / "found.json").write_text(json.dumps(found))
"""
    change = """
import io, torch
os.environ["MINE"] = "1"; del os.environ["HOME"]
sys.path.insert(0, "/mine"); sys.stdout = io.StringIO()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
registry.ALGORITHMS["Mine"] = "mine:Mine"; registry.PROMPTS["Mine"] = "mine:Text"; registry.DATASETS.clear()
torch.set_num_threads(3); torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)
torch.set_float32_matmul_precision("medium"); torch.use_deterministic_algorithms(True)
cudnn = torch.backends.cudnn
cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, True, True, False
torch.backends.cuda.matmul.fp32_precision = "tf32"; torch.set_default_device("meta")
os.chdir("/")
"""
    assert local.launch([job("a", show), job("b", change), job("c", show)], 1, jobs_per_process=3) == [0, 0, 0]
    a, c = (json.loads((stub / name / "found.json").read_text()) for name in "ac")
    assert [(x, y) for x, y in zip(a, c, strict=True) if x != y] == []
    assert len({(stub / name / "pid").read_text() for name in "abc"}) == 1


def test_what_a_plugin_sets_holds_for_every_job(stub: Path) -> None:
    (stub / "plugin.py").write_text("import os, torch\ntorch.set_grad_enabled(False)\nos.environ['MINE'] = '1'")
    body = "import plugin, torch; return int(torch.is_grad_enabled() or 'MINE' not in os.environ)"
    commands = [[*job(name, body), "--import", "plugin"] for name in "ab"]
    assert local.launch(commands, 1, jobs_per_process=2) == [0, 0]


def test_a_folder_that_was_deleted_before_the_worker_came(stub: Path) -> None:
    line = json.dumps({"module": "stub", "argv": ["--output_dir", "a", ""], "log": str(stub / "a" / LOG)})
    worker = [sys.executable, "-m", "domainbed_hp.scripts.worker"]
    assert subprocess.run(worker, input=line, text=True, capture_output=True).stdout == "0\n"


def test_workers_need_modules(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="jobs_per_process needs commands"):
        local.launch([child("", tmp_path)], jobs_per_process=2)


@pytest.fixture
def launcher(stub: Path) -> Iterator[Any]:
    """Starts a launcher of jobs that wait, two at a time of three, and gives it when both have started."""
    processes = []

    def start(jobs_per_process: int, what: str = "wait") -> "subprocess.Popen[bytes]":
        commands = [job(name, what) for name in "abc"]
        code = f"from domainbed_hp.launchers.local import launch; launch({commands!r}, 2, {jobs_per_process})"
        # A session of its own: what Ctrl-C signals in a terminal.
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
        processes.append(process)
        while not all((stub / name / "started").exists() for name in "ab"):
            assert process.poll() is None
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def gone(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@POSIX
@pytest.mark.parametrize("jobs_per_process", [1, 2])
def test_an_interrupt_lets_jobs_save_and_starts_no_more(stub: Path, launcher: Any, jobs_per_process: int) -> None:
    process = launcher(jobs_per_process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert b"Waiting for 2 jobs to save their state" in error
    assert all((stub / name / "saved").read_text() == "SIGTERM\n" for name in "ab"), "one signal each"
    assert all(gone(stub / name / "pid") for name in "ab")
    assert not (stub / "c").exists()


@POSIX
def test_a_second_interrupt_kills(stub: Path, launcher: Any) -> None:
    process = launcher(
        1, "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / 'started').touch(); time.sleep(600)"
    )
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith(b"Waiting for 2 jobs")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert all(gone(stub / name / "pid") for name in "ab")


@pytest.mark.slow
@POSIX
def test_a_worker_outlives_its_launcher_by_one_job(stub: Path, launcher: Any) -> None:
    wait = "(folder / 'started').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(0.02)\n"
    process = launcher(2, wait + "(folder / 'end').touch()")
    process.kill()
    (stub / "go").touch()
    deadline = time.monotonic() + 20
    while not all(gone(stub / name / "pid") for name in "ab") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(stub / name / "pid") and (stub / name / "end").exists() for name in "ab")
    assert not (stub / "c").exists()


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's records but for times."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line["args"].pop("output_dir")
    return [{key: value for key, value in line.items() if key not in ("step_time", "elapsed_s")} for line in lines]


@pytest.mark.slow
def test_results_of_a_shared_process_are_those_of_separate_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hparams = json.dumps({"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 2})
    train = [sys.executable, "-m", "domainbed_hp.scripts.train", "--dataset", "Debug28", "--hparams", hparams]
    train += ["--steps", "3", "--checkpoint_freq", "2", "--eval_images", "4", "--skip_model_save"]

    def launch(name: str, algorithms: list[str], jobs_per_process: int) -> list[list[dict[str, Any]]]:
        folders = [tmp_path / name / str(i) for i in range(len(algorithms))]
        pairs = zip(algorithms, folders, strict=True)
        commands = [[*train, "--algorithm", algorithm, "--output_dir", str(folder)] for algorithm, folder in pairs]
        assert local.launch(commands, 1, jobs_per_process) == [0] * len(commands)
        return [records(folder) for folder in folders]

    purified, shared = launch("apart", ["HeadPurification", "LoRA"], 1)
    assert launch("together", ["HeadPurification", "LoRA", "HeadPurification"], 3) == [purified, shared, purified]
    assert len(purified) == len(shared) == 2 and purified != shared


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, four_cores: None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, GPU-5e")


def test_one_job_on_each_gpu(tmp_path: Path, two_gpus: None) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert multi_gpu.launch([child(MEET, tmp_path / "1", a, b), child(MEET, tmp_path / "2", b, a)]) == [0, 0]
    assert (a.read_text(), b.read_text()) == ("20", "2GPU-5e")


def test_never_two_jobs_on_one_gpu(tmp_path: Path, two_gpus: None) -> None:
    commands = [child(ALONE, tmp_path / str(i), tmp_path / "lock") for i in range(6)]
    assert multi_gpu.launch(commands) == [0] * 6
    assert multi_gpu.launch(commands, jobs_per_gpu=3) != [0] * 6


def test_a_second_job_on_a_gpu_after_one_on_each(tmp_path: Path, two_gpus: None) -> None:
    names = [tmp_path / name for name in "abc"]
    pairs = zip(names, names[1:] + names[:1], strict=True)
    commands = [child(MEET, tmp_path / str(i), mine, other) for i, (mine, other) in enumerate(pairs)]
    assert multi_gpu.launch(commands, jobs_per_gpu=2) == [0, 0, 0]
    assert [name.read_text() for name in names] == ["10", "1GPU-5e", "10"]


@pytest.mark.parametrize(
    ("visible", "found"), [("1", ["1"]), ("3,1", ["3", "1"]), ("MIG-a/b, 0", ["MIG-a/b", "0"]), ("0,-1,1", ["0"])]
)
def test_visible_gpus(visible: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert multi_gpu.gpus() == found


@pytest.mark.parametrize("visible", ["", "-1", ",0"])
def test_hidden_gpus_are_an_error(visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match=f"needs a GPU, and CUDA_VISIBLE_DEVICES='{visible}' hides them all"):
        multi_gpu.launch([child("", tmp_path / "job")])
    assert not (tmp_path / "job").exists()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; CUDA_VISIBLE_DEVICES is not set."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "bin"


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@POSIX
def test_gpus_of_the_machine(tools: Path) -> None:
    put(
        tools / "nvidia-smi",
        "#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: GPU-2)'\n",
    )
    assert multi_gpu.gpus() == ["0", "1"]


@POSIX
def test_torch_counts_where_nvidia_smi_cannot(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    put(tools / "python", "#!/bin/sh\ncase $2 in *torch.cuda.device_count*) echo 3;; esac\n")
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    assert multi_gpu.gpus() == ["0", "1", "2"]
    put(tools / "python", "#!/bin/sh\nexit 1\n")
    with pytest.raises(UsageError, match="this machine has none that nvidia-smi or torch can see"):
        multi_gpu.gpus()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:01", 91), ("2:00:00", 120), ("1:30:01", 91), ("1-12", 2160), ("1-0:5", 1445), ("0-1:0:1", 61)],
)
def test_times_of_slurm(text: str, minutes: int) -> None:
    assert slurm.sbatch_options({"time": text}) == {"requeue": True, "time": minutes}
    assert slurm.minutes_of(text) == minutes


def test_options_of_slurm() -> None:
    given = {"timeout-min": "30", "gpus-per-node": "1", "exclusive": "", "mem": "8G", "requeue": "true"}
    options = {"requeue": True, "time": 30, "gpus_per_node": "1", "exclusive": True, "mem": "8G"}
    assert slurm.sbatch_options(given) == options
    assert slurm.sbatch_options({})["time"] == 240


@pytest.mark.parametrize("time", ["soon", "1-", "1:2:3:4", "-5", "4", "4:00", "0-0:4"])
def test_times_that_are_none_or_too_short(time: str) -> None:
    with pytest.raises(UsageError, match=f"--slurm time={time}: expected"):
        slurm.launch([["train"]], slurm={"time": time})


def test_a_machine_without_slurm(tmp_path: Path, tools: Path) -> None:
    with pytest.raises(UsageError, match="needs Slurm's commands"):
        slurm.launch([child("", tmp_path / "sweep" / "job")])
    assert not (tmp_path / "sweep").exists()


def test_dummy_prints_what_a_shell_takes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dummy.launch([["train", "--label", "no gates", "--output_dir", str(tmp_path / "job")]]) == [0]
    assert capsys.readouterr().out == f"Dummy launcher: train --label 'no gates' --output_dir {tmp_path}/job\n"
    assert (tmp_path / "job").is_dir()
