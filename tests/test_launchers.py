import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from domainbed_hp.launchers import dummy, local

ROOT = Path(__file__).parents[1]


def child(code: str, *args: object) -> list[str]:
    """argv of a Python process that runs `code`."""
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]


# Each of two waits for the other: only when both run at once do they end.
MEET = """
    import os, pathlib, sys, time
    mine, other, = map(pathlib.Path, sys.argv[1:3])
    mine.write_text(os.environ["OMP_NUM_THREADS"])
    for _ in range(400):
        if other.exists():
            sys.exit(0)
        time.sleep(0.05)
    sys.exit(1)
"""


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_two_jobs_run_at_once_and_share_the_cores(tmp_path: Path, four_cores: None) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert local.launch([child(MEET, a, b), child(MEET, b, a)]) == [0, 0]
    assert (a.read_text(), b.read_text()) == ("2", "2")


def test_threads_set_by_the_user_stay(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.launch([child(MEET, tmp_path / "a", tmp_path)]) == [0]
    assert (tmp_path / "a").read_text() == "7"


def test_never_more_than_max_parallel(tmp_path: Path, four_cores: None) -> None:
    alone = """
        import os, sys, time
        os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))
        time.sleep(0.1)
        os.remove(sys.argv[1])
    """
    assert local.launch([child(alone, tmp_path / "lock")] * 3, max_parallel=1) == [0, 0, 0]
    assert local.launch([child(alone, tmp_path / "lock")] * 3, max_parallel=3) != [0, 0, 0]


def test_no_commands() -> None:
    assert local.launch([]) == []
    assert dummy.launch([]) == []


def test_a_failed_job_is_reported_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fail = "import sys; print('shown to nobody'); raise RuntimeError('the reason')"
    commands = [child(code, "--output_dir", tmp_path / name) for name, code in [("bad", fail), ("good", "")]]
    assert local.launch(commands, max_parallel=1) == [1, 0]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"failed with exit code 1: {tmp_path / 'bad'}"
    assert err.splitlines()[1].startswith("    RuntimeError: the reason (all of it: ")
    assert "Traceback" in (tmp_path / "bad" / "launch.log").read_text()
    assert list((tmp_path / "good").iterdir()) == []


def test_a_killed_job_has_a_negative_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert local.launch([child(kill, "--output_dir", tmp_path / "job")]) == [-9]
    assert "it wrote nothing to stderr" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_ends_the_children_and_starts_no_more(tmp_path: Path) -> None:
    sleep = """
        import os, pathlib, sys, time
        (pathlib.Path(sys.argv[-1]) / "pid.part").write_text(str(os.getpid()))
        (pathlib.Path(sys.argv[-1]) / "pid.part").rename(pathlib.Path(sys.argv[-1]) / "pid")
        time.sleep(600)
    """
    commands = [child(sleep, "--output_dir", tmp_path / str(i)) for i in range(3)]
    code = f"from domainbed_hp.launchers.local import launch; launch({commands!r}, max_parallel=2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    pids = [tmp_path / str(i) / "pid" for i in range(2)]
    while not all(pid.exists() for pid in pids):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate()
    assert b"KeyboardInterrupt" in error
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    assert not (tmp_path / "2").exists()


def test_dummy_prints_what_a_shell_takes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dummy.launch([["train", "--label", "no gates", "--output_dir", str(tmp_path / "job")]]) == [0]
    assert capsys.readouterr().out == f"Dummy launcher: train --label 'no gates' --output_dir {tmp_path}/job\n"
    assert (tmp_path / "job").is_dir()
