import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leases import leave_lease

from domainbed_hp import run_dir
from domainbed_hp.launchers import dummy, local, multi_gpu, slurm
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, LAUNCH_LOG

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
    assert local.launch([]) == dummy.launch([]) == multi_gpu.launch([]) == []


def test_a_job_without_a_folder_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one with --output_dir"):
        local.launch([["train", "--output_dir"]])


@pytest.mark.parametrize("max_parallel", [0, -1])
def test_numbers_below_one_are_refused(max_parallel: int) -> None:
    with pytest.raises(UsageError, match="expected at least 1"):
        local.launch([], max_parallel)


def test_what_is_done_or_running_is_not_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "done").write_text("done")
    commands = [child("raise RuntimeError", tmp_path / name) for name in ("done", "running")]
    with run_dir.RunLock(tmp_path / "running"):
        assert local.launch(commands) == [EXIT_TAKEN, EXIT_TAKEN]
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.rglob(LAUNCH_LOG))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job that seems to run on another host; a lease lasts 0.5 s."""
    monkeypatch.setattr(run_dir, "LEASE_S", 0.5)
    leave_lease(tmp_path / "remote")
    return tmp_path / "remote"


# Notes that it ran.
NOTE = """
    import pathlib, sys
    with open("order", "a") as file: file.write(pathlib.Path(sys.argv[2]).name + " ")
"""


def test_a_job_of_another_host_that_lives_is_not_started(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(remote.parent)
    dead = threading.Event()

    def live() -> None:
        while not dead.wait(0.1):
            os.utime(remote / run_dir.LOCK)

    thread = threading.Thread(target=live)
    thread.start()
    commands = [child(NOTE, remote.parent / name) for name in ("remote", "a", "b")]
    assert local.launch(commands, max_parallel=1) == [EXIT_TAKEN, 0, 0]
    assert Path("order").read_text() == "a b "
    dead.set()
    thread.join()


def test_a_job_that_another_host_left_comes_last_and_once(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(remote.parent)
    leave_lease(remote.with_name("too"))
    commands = [child(NOTE, remote.parent / name) for name in ("remote", "too", "a")]
    start = time.monotonic()
    assert local.launch(commands, max_parallel=1) == [0, 0, 0]
    assert Path("order").read_text() == "a remote too " and time.monotonic() - start < 2, "they are watched together"


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
    assert err.splitlines()[1] == f"    RuntimeError: the reason (all of it: {tmp_path / 'bad' / LAUNCH_LOG})"
    assert "Traceback" in (tmp_path / "bad" / LAUNCH_LOG).read_text()
    assert list((tmp_path / "good").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    commands = [child("", Path(name)) for name in ("a", "file/b", "file", "c")]
    assert local.launch(commands, 1) == [0, 1, 1, 0]
    reasons = ["file/b: cannot be written to: Not a directory", "file: cannot be written to: File exists"]
    assert capfd.readouterr().err.splitlines() == reasons


def test_the_reason_is_that_of_this_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for reason in ["the first", "the second"]:
        local.launch([child(f"import sys; sys.exit({reason!r})", tmp_path)])
    local.launch([child("import os; os._exit(3)", tmp_path)])
    lines = capfd.readouterr().err.splitlines()[1::2]
    assert lines == ["    the first", "    the second", "    it wrote nothing to stderr"]
    assert (tmp_path / LAUNCH_LOG).read_text() == "the first\nthe second\n"


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


# Notes the signal that asks it to stop, or ignores it.
WAIT = """
    import os, pathlib, signal, sys, time
    folder = pathlib.Path(sys.argv[2])
    def save(number, frame):
        with open(folder / "saved", "a") as file:
            file.write(signal.Signals(number).name)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "ignore" in sys.argv else save)
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "started").touch()
    time.sleep(600)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Any]:
    """Starts a launcher of jobs that wait, two at a time of three, and gives it when both have started."""
    processes = []

    def start(*args: str) -> "subprocess.Popen[bytes]":
        commands = [child(WAIT, tmp_path / name, *args) for name in "abc"]
        code = f"from domainbed_hp.launchers.local import launch; launch({commands!r}, 2)"
        # A session of its own: what Ctrl-C signals in a terminal.
        process = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, cwd=ROOT
        )
        processes.append(process)
        while not all((tmp_path / name / "started").exists() for name in "ab"):
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
def test_an_interrupt_lets_jobs_save_and_starts_no_more(tmp_path: Path, launcher: Any) -> None:
    process = launcher()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert b"Waiting for 2 jobs to save their state" in error
    assert all((tmp_path / name / "saved").read_text() == "SIGTERM" for name in "ab"), "one signal each"
    assert all(gone(tmp_path / name / "pid") for name in "ab")
    assert not (tmp_path / "c").exists()


@POSIX
def test_a_second_interrupt_kills(tmp_path: Path, launcher: Any) -> None:
    process = launcher("ignore")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith(b"Waiting for 2 jobs")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert all(gone(tmp_path / name / "pid") for name in "ab")


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
    commands = [child(MEET, tmp_path / str(i), own, other) for i, (own, other) in enumerate(pairs)]
    assert multi_gpu.launch(commands, jobs_per_gpu=2) == [0, 0, 0]
    assert [name.read_text() for name in names] == ["10", "1GPU-5e", "10"]


@pytest.mark.parametrize(
    ("visible", "gpus"), [("1", ["1"]), ("3,1", ["3", "1"]), ("MIG-a/b, 0", ["MIG-a/b", "0"]), ("0,-1,1", ["0"])]
)
def test_visible_gpus(visible: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert multi_gpu.find_gpus() == gpus


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
    assert multi_gpu.find_gpus() == ["0", "1"]


@POSIX
def test_torch_counts_where_nvidia_smi_cannot(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    put(tools / "python", "#!/bin/sh\ncase $2 in *torch.cuda.device_count*) echo 3;; esac\n")
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    assert multi_gpu.find_gpus() == ["0", "1", "2"]
    put(tools / "python", "#!/bin/sh\nexit 1\n")
    with pytest.raises(UsageError, match="this machine has none that nvidia-smi or torch can see"):
        multi_gpu.find_gpus()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:01", 91), ("2:00:00", 120), ("1:30:01", 91), ("1-12", 2160), ("1-0:5", 1445), ("0-1:0:1", 61)],
)
def test_times_of_slurm(text: str, minutes: int) -> None:
    assert slurm.parse_options({"time": text}) == {"requeue": True, "time": minutes}
    assert slurm.parse_minutes(text) == minutes


def test_options_of_slurm() -> None:
    given = {"timeout-min": "30", "gpus-per-node": "1", "exclusive": "", "mem": "8G", "requeue": "true"}
    options = {"requeue": True, "time": 30, "gpus_per_node": "1", "exclusive": True, "mem": "8G"}
    assert slurm.parse_options(given) == options
    assert slurm.parse_options({})["time"] == 240
    assert "requeue" not in slurm.parse_options({"requeue": "false"})


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
