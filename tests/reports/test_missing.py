import json
from itertools import combinations

import pytest
from made_records import collected, launched, minimal, record, write

from domainbed_hp.model_selection import IIDAccuracy, LeaveOneOut, Oracle
from domainbed_hp.reports.load import load_runs
from domainbed_hp.reports.missing import describe_jobs, find_missing, format_ranges, list_jobs
from domainbed_hp.reports.report import make_report
from domainbed_hp.seeds import seed_hash
from domainbed_hp.sweep.jobs import Job

ARGS = {"algorithm": "ERM", "dataset": "PACS"}


def keys(missing):
    return [(m.row, m.dataset, m.test_envs, m.job.args["trial_seed"], m.job.args["hparams_seed"]) for m in missing]


def test_a_trial_that_others_have_is_missed():
    lora = [record(env, 0.5, trial, algorithm="LoRA") for env in range(4) for trial in range(3)]
    erm = [record(env, 0.5, trial) for env in range(4) for trial in range(3) if (env, trial) != (2, 1)]
    assert keys(find_missing(collected(lora + erm))) == [("ERM", "PACS", (2,), 1, 0)]
    assert find_missing(collected(lora)) == []


def test_hparams_seeds_and_environments_of_the_row_are_missed():
    result = find_missing(collected([record(env, 0.5, hparams_seed=seed) for env, seed in ((0, 0), (0, 1), (1, 1))]))
    lacking = [((1,), 0), ((2,), 0), ((2,), 1), ((3,), 0), ((3,), 1)]
    assert [(m.test_envs, m.job.args["hparams_seed"]) for m in result] == lacking
    assert describe_jobs(result) == [
        "ERM, PACS, test_envs 1, trial 0, hparams_seed 0",
        "ERM, PACS, test_envs 2, trial 0, hparams_seed 0-1",
        "ERM, PACS, test_envs 3, trial 0, hparams_seed 0-1",
    ]


def test_who_has_a_pair_misses_the_others():
    pairs = [minimal(test_envs=list(envs)[::-1]) for envs in combinations(range(3), 2)]
    singles = [minimal(test_envs=[i]) for i in range(3)]
    assert find_missing(collected(singles)) == []
    (missing,) = find_missing(collected(singles + pairs[1:]))
    assert missing.test_envs == (0, 1)
    completed = [(env, m) for env in range(3) for m in (IIDAccuracy, LeaveOneOut) if missing.completes(env, m)]
    assert completed == [(0, LeaveOneOut), (1, LeaveOneOut)]


def test_pairs_of_far_apart_environments_are_missed_too():
    runs = [minimal(test_envs=list(envs)) for envs in [(0,), (1,), (2,), (3,), *combinations(range(4), 2)]]
    runs = [run | {"env3_out_acc": 0.5} for run in runs if run["args"]["test_envs"] != [0, 3]]
    assert [missing.test_envs for missing in find_missing(collected(runs))] == [(0, 3)]


def test_environments_are_counted_over_all_runs():
    runs = [record(env, 0.5) for env in range(3)] + [record(0, 0.5, trial_seed=0, algorithm="LoRA", num_envs=3)]
    assert ("ERM", (3,)) in [(missing.row, missing.test_envs) for missing in find_missing(collected(runs))]


def test_a_run_that_was_interrupted_is_missed():
    runs = [record(env, 0.5) | {"step": step} for env in range(4) for step in (0, 9) if (env, step) != (2, 9)]
    assert [missing.test_envs for missing in find_missing(collected(runs))] == [(2,)]


def test_modules_of_ones_own_come_with_the_job():
    runs = [record(env, 0.5, imports=["mine"]) for env in range(3)]
    (missing,) = find_missing(collected(runs))
    assert missing.job.args["import"] == ["mine"] and "imports" not in missing.job.args


def test_a_single_run_completes_its_cell_under_every_method():
    (missing,) = find_missing(collected([record(env, 0.5) for env in range(3)]))
    for method in (IIDAccuracy, LeaveOneOut, Oracle):
        assert [missing.completes(env, method) for env in range(4)] == [False, False, False, True]


def test_planned_jobs_are_missed_until_they_are_done(tmp_path):
    jobs = launched(tmp_path, [{**ARGS, "test_envs": [env], "steps": 7} for env in range(4)])
    assert find_missing(load_runs(tmp_path)) == []
    (jobs[1].folder / "done").unlink()
    (jobs[2].folder / "results.jsonl").unlink()
    (jobs[2].folder / "done").unlink()
    assert [missing.job for missing in find_missing(load_runs(tmp_path))] == [jobs[1], jobs[2]]


def test_the_job_of_a_trial_that_was_not_planned_is_as_the_sweep_would_make_it(tmp_path):
    launched(tmp_path / "a", [{**ARGS, "test_envs": [env], "steps": 7} for env in range(4)])
    write(tmp_path / "b", record(0, 0.5, trial_seed=1, algorithm="LoRA"))
    result = [missing for missing in find_missing(load_runs(tmp_path)) if missing.row == "ERM"]
    assert [(m.test_envs, m.job.args["trial_seed"]) for m in result] == [((i,), 1) for i in range(4)]
    args = {**ARGS, "test_envs": [2], "steps": 7, "holdout_fraction": 0.2, "hparams_seed": 0, "trial_seed": 1}
    assert result[2].job == Job.create(tmp_path / "a", {**args, "seed": seed_hash("PACS", "ERM", [2], 0, 1)})


def test_launchable_is_json_of_the_arguments(tmp_path):
    (job, *_) = launched(tmp_path, [{**ARGS, "test_envs": [env]} for env in range(4)])
    (job.folder / "done").unlink()
    result = json.loads(json.dumps(list_jobs(find_missing(load_runs(tmp_path)))))
    assert result == {"jobs": [{"output_dir": str(tmp_path), "args": job.args}]}


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([5, 0, 1, 7, 8], "0-1, 5, 7-8")])
def test_ranges(numbers, text):
    assert format_ranges(numbers) == text


def test_a_row_that_is_planned_with_fewer_trials_lacks_none(tmp_path):
    runs = [{"algorithm": a, "trial_seed": trial} for a, trial in (("ERM", 0), ("LoRA", 0), ("ERM", 1))]
    launched(tmp_path, [{"dataset": "PACS", "test_envs": [env], **run} for run in runs for env in range(4)])
    assert {key[0] for key in keys(find_missing(load_runs(tmp_path)))} == {"LoRA"}
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    for row, n_trials in zip(sweep["rows"], (2, 1), strict=True):
        row["n_trials"] = n_trials
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert find_missing(load_runs(tmp_path)) == []
    assert "rows with fewer than 2 trials, as planned: LoRA (1)" in make_report(load_runs(tmp_path)).notes
    write(tmp_path / "other", record(0, 0.5, algorithm="LoRA", steps=3))  # a row of its own, planned alike
    assert {(key[0], key[3]) for key in keys(find_missing(load_runs(tmp_path)))} == {("LoRA (steps=3)", 0)}
