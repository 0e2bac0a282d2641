import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from domainbed_hp import run_dir
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import State, Taken, claim, failure, state

HOLD = """
import sys, time
from pathlib import Path
from domainbed_hp.run_dir import claim
with claim(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "here\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def of_another_machine(folder: Path, age_s: float) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / run_dir.HEARTBEAT
    path.write_text(json.dumps({"machine": "elsewhere", "host": "node7", "pid": 12}))
    then = time.time() - age_s
    os.utime(path, (then, then))


def test_the_life_of_a_run(folder: Path) -> None:
    assert state(folder) == State.NOT_LAUNCHED
    with claim(folder):
        assert state(folder) == State.RUNNING
        (folder / "results.jsonl").touch()
    assert state(folder) == State.INCOMPLETE and names(folder) == {"results.jsonl"}
    with claim(folder):
        (folder / "done").write_text("done")
    assert state(folder) == State.DONE
    with pytest.raises(Taken, match="already holds a run that is done"), claim(folder):
        pass


def test_nobody_works_where_somebody_works(folder: Path, holder: subprocess.Popen[str]) -> None:
    assert state(folder) == State.RUNNING
    with pytest.raises(Taken, match=f"process {holder.pid} on .* works in"), claim(folder):
        pass
    assert state(folder) == State.RUNNING


def test_a_process_that_was_killed_is_seen_as_dead_at_once(folder: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert state(folder) == State.INCOMPLETE and run_dir.HEARTBEAT in names(folder)
    with claim(folder):
        assert state(folder) == State.RUNNING


def test_of_many_that_start_together_one_works(folder: Path) -> None:
    working, most = 0, 0
    counts: list[int] = []
    gate = threading.Barrier(8)

    def work() -> None:
        nonlocal working, most
        gate.wait()
        try:
            with claim(folder):
                working += 1
                most = max(most, working)
                counts.append(1)
                time.sleep(1.5)
                working -= 1
        except Taken:
            pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(counts) == 1


def test_a_machine_whose_locks_do_not_reach_here_is_known_by_its_heartbeat(folder: Path) -> None:
    of_another_machine(folder, age_s=50)
    assert state(folder) == State.RUNNING
    with pytest.raises(Taken, match="process 12 on node7"), claim(folder):
        pass
    assert names(folder) == {run_dir.HEARTBEAT, run_dir.LOCK}, "the lock is the other's"
    of_another_machine(folder, age_s=70)
    assert state(folder) == State.INCOMPLETE
    with claim(folder) as held:
        assert held.mine()


def test_a_heartbeat_that_is_just_being_written_is_one(folder: Path) -> None:
    folder.mkdir()
    (folder / run_dir.HEARTBEAT).touch()
    assert state(folder) == State.RUNNING
    with pytest.raises(Taken, match="another process works in"), claim(folder):
        pass
    os.utime(folder / run_dir.HEARTBEAT, (0, 0))
    assert state(folder) == State.INCOMPLETE
    with claim(folder) as held:
        assert held.mine()


@pytest.mark.parametrize("written", [True, False], ids=["has taken it over", "is about to"])
def test_of_two_machines_that_find_a_run_dead_one_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    of_another_machine(folder, age_s=70)
    judge = run_dir.elsewhere

    def slowly(heartbeat: Path) -> bool:
        lives = judge(heartbeat)
        if heartbeat.name == run_dir.HEARTBEAT:  # the other one was faster
            heartbeat.unlink()
            if written:
                of_another_machine(folder, age_s=0)
        return lives

    monkeypatch.setattr(run_dir, "elsewhere", slowly)
    if written:
        with pytest.raises(Taken, match="node7"), claim(folder):
            pass
        assert names(folder) == {run_dir.HEARTBEAT, run_dir.LOCK} and state(folder) == State.RUNNING
    else:
        with claim(folder) as held:
            assert held.mine()


def test_who_looks_is_not_taken_for_who_works(folder: Path, holder: subprocess.Popen[str]) -> None:
    fcntl = pytest.importorskip("fcntl")
    holder.kill()
    holder.wait()
    with open(folder / run_dir.LOCK) as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert state(folder) == State.INCOMPLETE
        threading.Timer(0.3, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        with claim(folder):
            assert state(folder) == State.RUNNING


def test_the_heart_beats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "BEAT_S", 0.02)
    with claim(folder):
        os.utime(folder / run_dir.HEARTBEAT, (0, 0))
        time.sleep(0.2)
        assert time.time() - (folder / run_dir.HEARTBEAT).stat().st_mtime < 10


def test_who_was_taken_for_dead_learns_it(folder: Path) -> None:
    with claim(folder) as held:
        held.check()
        of_another_machine(folder, age_s=0)
        with pytest.raises(Taken, match="node7"):
            held.check()
    assert run_dir.HEARTBEAT in names(folder)  # it is the other's


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("room", [True, False])
def test_who_was_taken_for_dead_leaves_the_folder_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    folder.mkdir()
    with pytest.raises(Taken), claim(folder) as held:
        of_another_machine(folder, age_s=0)
        if not room:
            monkeypatch.setattr(Path, "write_text", full)
        held.check()
    assert names(folder) == {run_dir.HEARTBEAT, run_dir.LOCK} and state(folder) == State.RUNNING


def test_an_error_is_kept_until_the_next_start(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), claim(folder):
        1 / 0  # noqa: B018
    assert state(folder) == State.FAILED and failure(folder) == "ZeroDivisionError: division by zero"
    assert "Traceback" in (folder / "err.txt").read_text()
    with claim(folder):
        assert names(folder) == {run_dir.LOCK, run_dir.HEARTBEAT}
    assert state(folder) == State.INCOMPLETE


def test_bad_input_is_one_line(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(UsageError), claim(folder):
        raise UsageError("steps: got 0")
    assert (folder / "err.txt").read_text() == "steps: got 0\n"


def test_a_slip_of_the_hand_leaves_no_folder(folder: Path) -> None:
    with pytest.raises(UsageError), claim(folder):
        raise UsageError("steps: got 0")
    assert not folder.exists()


def test_an_interrupt_is_no_failure(folder: Path) -> None:
    with pytest.raises(SystemExit), claim(folder):
        (folder / "out.txt").touch()
        raise SystemExit(143)
    assert state(folder) == State.INCOMPLETE and names(folder) == {"out.txt"}


def test_on_a_full_disk_the_end_of_the_error_takes_the_room_of_the_heartbeat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    with pytest.raises(RuntimeError), claim(folder):
        monkeypatch.setattr(Path, "write_text", full)
        raise RuntimeError("x" * 3000 + " the end")
    assert state(folder) == State.FAILED and failure(folder).endswith("the end")
    assert names(folder) == {"err.txt"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"), claim(tmp_path / "file" / "run"):
        pass


def test_no_torch_is_needed() -> None:
    code = "import sys, domainbed_hp.run_dir\nassert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
