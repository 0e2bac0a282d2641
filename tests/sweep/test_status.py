import json
import os
import time
from pathlib import Path

import pytest
from leases import REMOTE_LEASE

from domainbed_hp import run_dir
from domainbed_hp.run_dir import State
from domainbed_hp.sweep.jobs import LAUNCHERS_FOLDER, Job
from domainbed_hp.sweep.status import SweepStatus, compute_rate, estimate_cost, format_duration, read_elapsed


def job(folder: Path, state: State, row: str = "ERM", dataset: str = "PACS", took: float | None = None) -> Job:
    args = {"algorithm": row.split(",")[0], "dataset": dataset, "test_envs": [0], "hparams_seed": 0, "label": row}
    if state != State.NOT_LAUNCHED:
        folder.mkdir(parents=True)
    if state == State.DONE:
        (folder / run_dir.DONE).write_text("done")
    if state == State.RUNNING:
        (folder / run_dir.LOCK).write_text(REMOTE_LEASE)
    if state == State.FAILED:
        (folder / run_dir.ERROR).write_text("Traceback (most recent call last):\nValueError: no\n")
    if took is not None:
        lines = [{"step": 0, "elapsed_s": 1.0}, {"step": 1, "elapsed_s": took}]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Job(args, folder)


@pytest.fixture
def mixed(tmp_path: Path) -> list[Job]:
    states = [State.DONE, State.DONE, State.RUNNING, State.FAILED, State.INCOMPLETE, State.NOT_LAUNCHED]
    return [job(tmp_path / str(i), state, row="ERM" if i < 4 else "LoRA") for i, state in enumerate(states)]


def test_the_summary_is_domainbeds_while_nothing_runs_or_failed(tmp_path: Path, mixed: list[Job]) -> None:
    assert SweepStatus.of(mixed[5:]).summarize() == "1 jobs: 0 done, 0 incomplete, 1 not launched."
    assert SweepStatus.of(mixed).summarize() == "6 jobs: 2 done, 1 running, 1 failed, 1 incomplete, 1 not launched."


def test_a_line_says_why_a_job_failed(tmp_path: Path, mixed: list[Job]) -> None:
    (line,) = SweepStatus.of(mixed).list_jobs(State.FAILED)
    assert line == f"Failed: {tmp_path}/3 ('PACS', 'ERM', [0], 0): ValueError: no"


def test_the_table_counts_by_row(mixed: list[Job]) -> None:
    lines = [line.split() for line in SweepStatus.of(mixed).make_table().splitlines()]
    assert lines[2:] == [["ERM", "PACS", "2", "1", "1"], ["LoRA", "PACS", "1", "1"]]
    assert SweepStatus.of(mixed[:4]).make_table() == "", "one row says no more than the summary"


@pytest.mark.parametrize(
    ("done", "began", "expected"),
    [
        ([], 0, None),
        ([900], 0, None),  # since when?
        ([900], 100, 4.0),  # 1 in 900 s
        ([100, 400, 700, 1000], 0, 12.0),  # 3 since the first, in 900 s
        ([10, 20, 400, 700, 1000], 100, 12.0),  # a pause before this launch
        ([100, 400], 500, None),
        ([*range(100, 600, 5), *range(900, 1000, 2)], 0, 3600 * 49 / 100),  # faster of late
        ([*range(100, 600, 5), *range(900, 1000, 2)], 50, 3600 * 49 / 100),
        ([*range(1, 101), *range(900, 940)], 850, 3600 * 40 / 150),
    ],
)
def test_the_rate_is_of_late(done: list[float], began: float, expected: float | None) -> None:
    assert compute_rate(done, 1000, began) == (None if expected is None else pytest.approx(expected))


def test_speed_while_something_runs(tmp_path: Path, mixed: list[Job]) -> None:
    now = time.time()
    os.utime(mixed[0].folder / "done", (now - 1800,) * 2)
    os.utime(mixed[1].folder / "done", (now - 900,) * 2)
    status = SweepStatus.of(mixed)
    assert status.jobs_per_hour == pytest.approx(2, rel=0.01)
    assert status.eta_s == pytest.approx(3 * 1800, rel=0.01), "three are left; the failed one is not"
    assert status.describe_rate() == "2 jobs an hour: at this rate the rest is done in 1 h 30 min."
    assert status.to_json()["eta_s"] == status.eta_s

    (mixed[2].folder / run_dir.LOCK).unlink()
    assert SweepStatus.of(mixed).describe_rate() == "" and SweepStatus.of(mixed).jobs_per_hour is None, (
        "nothing is running"
    )


def test_the_rate_starts_with_the_launcher(tmp_path: Path, mixed: list[Job]) -> None:
    now = time.time()
    os.utime(mixed[0].folder / "done", (now - 90_000,) * 2)
    os.utime(mixed[1].folder / "done", (now - 900,) * 2)
    with run_dir.RunLock(tmp_path / LAUNCHERS_FOLDER / "host-1"):
        os.utime(tmp_path / LAUNCHERS_FOLDER / "host-1", (now - 1800,) * 2)
        status = SweepStatus.of(mixed)
    assert status.launchers == 1 and status.jobs_per_hour == pytest.approx(2, rel=0.01)


def test_json_counts_every_state(mixed: list[Job]) -> None:
    status = json.loads(json.dumps(SweepStatus.of(mixed).to_json()))
    assert status["rows"][1] == {
        "row": "LoRA", "dataset": "PACS", "done": 0, "running": 0, "failed": 0, "incomplete": 1, "not_launched": 1
    }  # fmt: skip
    assert [entry["state"] for entry in status["jobs"]] == [
        "done", "done", "running", "failed", "incomplete", "not_launched"
    ]  # fmt: skip
    assert status["jobs"][3]["error"] == "ValueError: no"


def test_time_of_a_run_is_in_the_last_record(tmp_path: Path) -> None:
    assert read_elapsed(job(tmp_path / "run", State.DONE, took=12.5).folder) == 12.5


@pytest.mark.parametrize("text", ["", "\n", '{"step": 1}\n', "3\n", '{"elapsed_s": "3"}'])
def test_a_record_that_does_not_say_how_long_it_took(tmp_path: Path, text: str) -> None:
    assert read_elapsed(tmp_path) is None
    (tmp_path / "results.jsonl").write_text(text)
    assert read_elapsed(tmp_path) is None


def test_an_estimate_goes_by_the_closest_jobs_that_are_done(tmp_path: Path) -> None:
    finished = [
        job(tmp_path / "a", State.DONE, "LoRA", "PACS", 100),
        job(tmp_path / "b", State.DONE, "LoRA", "PACS", 200),
        job(tmp_path / "c", State.DONE, "LoRA", "PACS", 900),
        job(tmp_path / "d", State.DONE, "LoRA, more", "PACS", 1000),
        job(tmp_path / "e", State.DONE, "ERM", "VLCS", 10),
        job(tmp_path / "f", State.DONE, "ERM", "VLCS"),
    ]
    left = [
        job(tmp_path / "1", State.NOT_LAUNCHED, "LoRA", "PACS"),  # 200
        job(tmp_path / "2", State.NOT_LAUNCHED, "LoRA, more", "PACS"),  # 1000
        job(tmp_path / "3", State.NOT_LAUNCHED, "LoRA, less", "VLCS"),  # of LoRA's 100, 200, 900, 1000: 550
        job(tmp_path / "4", State.NOT_LAUNCHED, "ZeroShotCLIP", "PACS"),  # of all: 200
    ]
    cost = estimate_cost(left, finished)
    assert "about 32 min, one job at a time" in cost, "1950 s"
    assert "5 finished jobs; 2 from jobs of the same row and data set, 1 from jobs of the same algorithm, 1 " in cost
    assert "8 min with 4 at a time" in estimate_cost(left, finished, parallel=4)
    assert estimate_cost(left, finished[5:]).startswith("No estimate")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
