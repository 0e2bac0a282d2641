import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from leases import leave_lease

from domainbed_hp import run_dir
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import RunLock, RunTaken, State, find_abandoned, read_failure, read_state

HOLD = """
import sys, time
from pathlib import Path
from domainbed_hp.run_dir import RunLock
with RunLock(Path(sys.argv[1])):
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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of 0.6 s, refreshed every 0.2 s."""
    monkeypatch.setattr(run_dir, "LEASE_S", 0.6)
    monkeypatch.setattr(run_dir, "POLL_S", 0.02)


@pytest.fixture
def clock() -> Callable[[], float]:
    """A function that returns the seconds since the test began."""
    start = time.monotonic()
    return lambda: time.monotonic() - start


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_life_of_a_run(folder: Path) -> None:
    assert read_state(folder) == State.NOT_LAUNCHED
    with RunLock(folder):
        assert read_state(folder) == State.RUNNING
        (folder / "results.jsonl").touch()
    assert read_state(folder) == State.INCOMPLETE and names(folder) == {"results.jsonl"}
    with RunLock(folder):
        (folder / "done").write_text("done")
    assert read_state(folder) == State.DONE
    with pytest.raises(RunTaken, match="already holds a run that is done"), RunLock(folder):
        pass
    assert names(folder) == {"results.jsonl", "done"}


def test_a_live_holder_is_named_at_once(
    folder: Path, holder: subprocess.Popen[str], clock: Callable[[], float]
) -> None:
    assert read_state(folder) == State.RUNNING
    with pytest.raises(RunTaken, match=f"process {holder.pid} on .* works in"), RunLock(folder):
        pass
    assert read_state(folder) == State.RUNNING and clock() < 1


def test_who_holds_it_in_this_process_too(folder: Path) -> None:
    with RunLock(folder) as lock:
        with pytest.raises(RunTaken, match=f"process {os.getpid()} on"), RunLock(folder):
            pass
        lock.check()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_holder_that_was_killed_is_replaced_at_once_and_one_that_sleeps_is_not(
    folder: Path, holder: subprocess.Popen[str], clock: Callable[[], float], number: int
) -> None:
    holder.send_signal(number)
    if number == signal.SIGSTOP:
        with pytest.raises(RunTaken), RunLock(folder):
            pass
    else:
        holder.wait()
        assert read_state(folder) == State.INCOMPLETE and names(folder) == {"lock"}
        with RunLock(folder):
            assert read_state(folder) == State.RUNNING
    assert clock() < 1


def test_of_many_that_start_together_one_works(folder: Path) -> None:
    working: list[int] = []
    refused: list[int] = []
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        gate.wait()
        try:
            with RunLock(folder):
                working.append(number)
                while len(refused) < 7:
                    time.sleep(0.01)
        except RunTaken:
            refused.append(number)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(working) == 1 and len(refused) == 7


@pytest.mark.usefixtures("short")
def test_a_dead_host_is_replaced_after_the_lease_duration(folder: Path, clock: Callable[[], float]) -> None:
    leave_lease(folder)
    assert read_state(folder) == State.RUNNING
    with RunLock(folder) as lock:
        assert clock() >= 0.6
        lock.check()
    assert names(folder) == set()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("age_s", [-3600, 3600])
def test_clocks_of_two_hosts_are_not_compared(folder: Path, clock: Callable[[], float], age_s: float) -> None:
    leave_lease(folder, age_s=age_s)
    with RunLock(folder):
        assert 0.6 <= clock() < 3


@pytest.mark.usefixtures("short")
def test_a_live_host_is_not_replaced(folder: Path, clock: Callable[[], float]) -> None:
    leave_lease(folder)
    threading.Timer(0.3, os.utime, (folder / "lock", (1, 1))).start()  # whatever its clock says
    with pytest.raises(RunTaken, match="process 12 on node7 works in"), RunLock(folder):
        pass
    assert 0.2 < clock() < 0.6
    assert names(folder) == {"lock"}


@pytest.mark.usefixtures("short")
def test_of_two_hosts_that_find_a_run_abandoned_one_goes_on(folder: Path) -> None:
    leave_lease(folder)
    threading.Timer(0.3, leave_lease, (folder, "node8", 7)).start()
    with pytest.raises(RunTaken, match="process 7 on node8"), RunLock(folder):
        pass


def test_the_state_of_another_host_is_believed_for_a_while(folder: Path) -> None:
    leave_lease(folder, age_s=run_dir.RUNNING_S - 10)
    assert read_state(folder) == State.RUNNING
    leave_lease(folder, age_s=run_dir.RUNNING_S + 10)
    assert read_state(folder) == State.INCOMPLETE
    leave_lease(folder, host=run_dir.get_host_name(), pid=2**31 - 1)
    assert read_state(folder) == State.INCOMPLETE


def test_a_lease_of_another_duration_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lease(folder)
    monkeypatch.setattr(run_dir, "LEASE_S", 10.0)
    with pytest.raises(RunTaken, match="node7"), RunLock(folder):
        pass


@pytest.mark.usefixtures("short")
def test_abandoned_runs_are_found_together(tmp_path: Path, clock: Callable[[], float]) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        leave_lease(folder)
    threading.Timer(0.2, os.utime, (folders[1] / "lock",)).start()
    assert find_abandoned(folders) == [folders[0], folders[2]]
    assert 0.6 <= clock() < 1.5
    assert find_abandoned([]) == []


@pytest.mark.usefixtures("short")
def test_abandoned_runs_are_not_waited_for_where_all_live(tmp_path: Path, clock: Callable[[], float]) -> None:
    leave_lease(tmp_path / "a")
    threading.Timer(0.1, os.utime, (tmp_path / "a" / "lock",)).start()
    assert find_abandoned([tmp_path / "a"]) == [] and clock() < 0.5


def test_a_folder_of_an_earlier_version_is_taken_over(folder: Path, clock: Callable[[], float]) -> None:
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "heartbeat.json").write_text('{"machine": "another", "host": "node7", "pid": 12}'.ljust(4096))
    assert read_state(folder) == State.INCOMPLETE
    with RunLock(folder) as lock:
        lock.check()
        assert names(folder) == {"lock"} and 2 <= clock() < 4
    assert names(folder) == set()


@pytest.mark.usefixtures("short")
def test_the_holder_gives_signs_of_life(folder: Path) -> None:
    with RunLock(folder) as lock:
        before = run_dir.read_stamp(folder)
        time.sleep(0.5)
        assert run_dir.read_stamp(folder) != before
        lock.check()


LOSSES = {
    "another host has it": leave_lease,
    "the lock was removed": lambda folder: (folder / "lock").unlink(),
    "the folder was removed": lambda folder: [(folder / "lock").unlink(), folder.rmdir()],
    "the folder was moved": lambda folder: folder.rename(folder.with_name("moved")),
}


@pytest.mark.parametrize("error", [None, RuntimeError("a consequence"), OSError(2, "no such file")])
@pytest.mark.parametrize("loss", LOSSES)
def test_who_lost_the_run_learns_it_and_writes_nothing(folder: Path, loss: str, error: Exception | None) -> None:
    folder.mkdir()
    message = "process 12 on node7" if "host" in loss else "was removed"
    with pytest.raises(RunTaken, match=message), RunLock(folder) as lock:
        lock.check()
        LOSSES[loss](folder)
        if error:
            raise error
        lock.check()
    assert names(folder) == ({"lock"} if "host" in loss else set()) if folder.exists() else "folder" in loss


def test_an_error_is_left_until_the_next_start(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), RunLock(folder):
        1 / 0  # noqa: B018
    assert read_state(folder) == State.FAILED and read_failure(folder) == "ZeroDivisionError: division by zero"
    assert "Traceback" in (folder / "err.txt").read_text()
    with RunLock(folder):
        assert names(folder) == {"lock"}
    assert read_state(folder) == State.INCOMPLETE


def test_bad_input_is_one_line(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(UsageError), RunLock(folder):
        raise UsageError("steps: got 0")
    assert (folder / "err.txt").read_text() == "steps: got 0\n"


def test_a_slip_of_the_hand_leaves_no_folder(folder: Path) -> None:
    with pytest.raises(UsageError), RunLock(folder):
        raise UsageError("steps: got 0")
    assert not folder.exists()


def test_an_interrupt_is_no_failure(folder: Path) -> None:
    with pytest.raises(SystemExit), RunLock(folder):
        (folder / "out.txt").touch()
        raise SystemExit(143)
    assert read_state(folder) == State.INCOMPLETE and names(folder) == {"out.txt"}


def test_on_a_full_disk_the_end_of_the_error_takes_the_room_of_the_lease(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def full(path: Path, text: str) -> int:
        if (folder / "lock").exists() or len(text) > 4096:
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    folder.mkdir()
    with pytest.raises(RuntimeError), RunLock(folder):
        monkeypatch.setattr(Path, "write_text", full)
        raise RuntimeError("x" * 5000 + " the end")
    assert read_state(folder) == State.FAILED and read_failure(folder).endswith("the end")
    assert names(folder) == {"err.txt"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"), RunLock(tmp_path / "file" / "run"):
        pass


def test_torch_and_numpy_are_not_needed() -> None:
    code = "import sys, domainbed_hp.run_dir\nassert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_refuses_a_taken_folder_before_it_loads_torch(folder: Path) -> None:
    code = """
import sys
from domainbed_hp.scripts import run
from domainbed_hp.scripts.train import main
code = run(main, ["--output_dir", sys.argv[1]])
assert not {"torch", "pandas"} & set(sys.modules)
sys.exit(code)
"""
    with RunLock(folder):
        assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == run_dir.EXIT_TAKEN
