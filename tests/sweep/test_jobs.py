import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from domainbed_hp import run_dir
from domainbed_hp.run_dir import State
from domainbed_hp.sweep.jobs import LAUNCHERS_FOLDER, Job, find_launchers, load_jobs, register_launcher

ROOT = Path(__file__).parents[2]


def jobs_of(output_dir: Path, algorithm: str, count: int = 2) -> list[Job]:
    shared = {"algorithm": algorithm, "dataset": "PACS", "test_envs": [0]}
    return [Job.create(output_dir, {**shared, "hparams_seed": seed}) for seed in range(count)]


def sweep_of(*algorithms: str) -> dict[str, Any]:
    return {"rows": [{"algorithm": name, "label": name, "hparams": {}} for name in algorithms]}


def algorithms_in(output_dir: Path) -> set[str]:
    return {job.args["algorithm"] for job in load_jobs(output_dir)}


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    (job, _) = jobs_of(tmp_path, "ERM")
    (job.folder / "deep" / "er").mkdir(parents=True)
    (job.folder / "deep" / "file").touch()
    (job.folder / "link").symlink_to(tmp_path)
    job.delete()
    assert not job.folder.exists() and tmp_path.exists()


def test_delete_touches_nothing_that_is_running_or_done(tmp_path: Path) -> None:
    running, done = jobs_of(tmp_path, "ERM")
    with run_dir.RunLock(running.folder):
        (running.folder / "results.jsonl").touch()
        with pytest.raises(run_dir.RunTaken):
            running.delete()
        assert (running.folder / "results.jsonl").exists()
    done.folder.mkdir()
    (done.folder / "done").touch()
    with pytest.raises(run_dir.RunTaken):
        done.delete()
    assert (done.folder / "done").exists()


def test_a_sweep_of_an_earlier_version_is_read_whatever_its_spec_holds(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "ERM")
    with register_launcher(tmp_path, sweep_of("ERM") | {"spec": {"jobs_per_process": 20}}, jobs):
        pass
    assert load_jobs(tmp_path) == jobs


def test_what_was_launched_stays_listed_and_what_was_not_is_forgotten(tmp_path: Path) -> None:
    first = jobs_of(tmp_path, "ERM")
    with register_launcher(tmp_path, sweep_of("ERM"), first):
        assert load_jobs(tmp_path) == first
    first[1].folder.mkdir()
    second = jobs_of(tmp_path, "LoRA")
    with register_launcher(tmp_path, sweep_of("LoRA"), second):
        pass
    assert load_jobs(tmp_path) == [*second, first[1]]
    assert [row["label"] for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]] == ["ERM", "LoRA"]


def test_what_is_part_of_a_sweep_forgets_none_of_it(tmp_path: Path) -> None:
    first = jobs_of(tmp_path, "ERM")
    with register_launcher(tmp_path, sweep_of("ERM"), first):
        pass
    with register_launcher(tmp_path, sweep_of("ERM"), first[:1], partial=True):
        pass
    assert load_jobs(tmp_path) == first


LAUNCHER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/sweep"]
from test_jobs import jobs_of, register_launcher, sweep_of

output_dir, name, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
Path(name).touch()
while not all(Path(other).exists() for other in others):  # start together
    time.sleep(0.001)
with register_launcher(output_dir, sweep_of(name), jobs_of(output_dir, name)):
    Path(name + ".in").touch()
    while not Path("end").exists():
        time.sleep(0.01)
"""


def start(tmp_path: Path, *names: str) -> list[subprocess.Popen[bytes]]:
    """Launchers of jobs that never start; they are at work when this returns."""
    command = [sys.executable, "-c", LAUNCHER.format(tests=str(ROOT / "tests")), "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([*command, name, *names], cwd=tmp_path, env=env) for name in names]
    while not all((tmp_path / f"{name}.in").exists() for name in names):
        assert not any(process.poll() for process in processes)
        time.sleep(0.01)
    return processes


def test_launchers_that_start_together_list_all_their_jobs(tmp_path: Path) -> None:
    names = [f"A{i}" for i in range(6)]
    processes = start(tmp_path, *names)
    assert algorithms_in(tmp_path / "out") == set(names)
    assert len(find_launchers(tmp_path / "out")) == 6
    (tmp_path / "end").touch()
    assert [process.wait() for process in processes] == [0] * 6
    assert find_launchers(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out" / LAUNCHERS_FOLDER).iterdir()] == [run_dir.LOCK]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_jobs_of_a_killed_launcher_are_forgotten(tmp_path: Path) -> None:
    (killed,) = start(tmp_path, "A")
    with register_launcher(tmp_path / "out", sweep_of("B"), jobs_of(tmp_path / "out", "B")):
        assert algorithms_in(tmp_path / "out") == {"A", "B"}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert find_launchers(tmp_path / "out") == []
    with register_launcher(tmp_path / "out", sweep_of("B"), jobs_of(tmp_path / "out", "B")):
        assert algorithms_in(tmp_path / "out") == {"B"}


def test_states_come_from_the_folder(tmp_path: Path) -> None:
    job, _ = jobs_of(tmp_path, "ERM")
    assert job.state is State.NOT_LAUNCHED
    with run_dir.RunLock(job.folder):
        assert job.state is State.RUNNING
        (job.folder / "out.txt").touch()
    assert job.state is State.INCOMPLETE
    (job.folder / "err.txt").write_text("Traceback\nMemoryError\n")
    assert job.state is State.FAILED and job.describe(job.state).endswith("[0], 0): MemoryError")
