import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_records import collected, frame, launched, minimal, record, write

from domainbed_hp.registry import UsageError
from domainbed_hp.reports.load import collect_records, load_runs
from domainbed_hp.run_args import PROTOCOL
from domainbed_hp.sweep.jobs import load_sweep


def rows(*records):
    return [run.row for run in collected(list(records)).runs]


def test_nested_runs_are_found_in_sorted_order_once(tmp_path):
    for name in ("b/run", "a/deep/run", "c"):
        write(tmp_path / name, minimal(), minimal())
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    other_folder = tmp_path.with_name("elsewhere")
    write(other_folder / "run", minimal())
    (tmp_path / "d").symlink_to(other_folder)
    result = load_runs(tmp_path)
    assert [os.path.relpath(run.folder, tmp_path) for run in result.runs] == ["a/deep/run", "b/run", "c", "d/run"]
    assert result.frame["run"].tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_what_is_not_a_readable_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*absent: No such file"):
        load_runs(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot read .*file: Not a directory"):
        load_runs(tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="cannot read .*results.jsonl: No such file"):
        load_runs(tmp_path)


def test_a_minimal_record():
    (row,) = frame([minimal(test_envs=[2, 0], label=None)]).to_dict("records")
    assert row == {
        **{"run": 0, "row": "ERM", "algorithm": "ERM", "dataset": "PACS", "trial_seed": 0, "hparams_seed": 0},
        **{"test_envs": (2, 0), "step": 0, "num_envs": 3, "env0_in_acc": 0.25, "env2_in_acc": 0.25},
        **{f"env{i}_out_acc": 0.5 for i in range(3)},
    }


def test_numbers_that_some_records_lack_are_nan():
    result = frame([minimal(), minimal() | {"loss": 2, "step": 1}, minimal() | {"step": 2}])
    assert result["loss"].tolist()[1] == 2 and np.isnan(result["loss"].to_numpy()[[0, 2]]).all()
    assert result["step"].tolist() == [0, 1, 2]


def test_the_label_is_the_row_and_environments_are_counted_without_a_gap():
    result = frame([minimal(label="ERM, frozen") | {"env4_out_acc": 0.5, "done": True}])
    assert result["row"].tolist() == ["ERM, frozen"]
    assert result["num_envs"].tolist() == [3]
    assert "done" not in result


@pytest.mark.parametrize("key", ["step", "args", "env0_in_acc", "env0_out_acc"])
def test_what_a_record_lacks_is_named(tmp_path, key):
    lacking = minimal()
    del lacking[key]
    write(tmp_path / "run7", lacking)
    named = "args.algorithm, args.dataset, .*" if key == "args" else key
    with pytest.raises(UsageError, match=f"a record of .*run7 has no {named}; a record needs"):
        load_runs(tmp_path)


def test_torn_lines_empty_files_and_nan_are_told(tmp_path):
    write(tmp_path / "a", minimal(), minimal() | {"step": 1, "env0_in_acc": float("nan")})
    with open(tmp_path / "a" / "results.jsonl", "ab") as file:
        file.write(b'{"args": {"algor\n\n12\n\xff\xfe')
    write(tmp_path / "b")
    result = load_runs(tmp_path)
    assert len(result.frame) == 2 and np.isnan(result.frame["env0_in_acc"][1])
    a, b = (tmp_path / name / "results.jsonl" for name in "ab")
    assert result.notes == [
        *(f"{a}: line {number} is not a whole record (cut off?) and is left out" for number in (3, 5, 6)),
        f"{a}: 1 records hold NaN; a NaN validation accuracy ranks below every other",
        f"{b} is empty",
    ]


def test_a_second_run_in_a_file_is_a_run_of_its_own(tmp_path):
    write(tmp_path / "run", minimal(), minimal(seed=1), minimal(seed=1))
    assert load_runs(tmp_path).frame["run"].tolist() == [0, 1, 1]


def test_a_record_names_its_loader_only_in_older_versions():
    assert rows(minimal(), minimal(trial_seed=1, loader="batched")) == ["ERM", "ERM"]
    expected = [f"ERM (loader={name})" for name in ("batched", "reference")]
    assert rows(minimal(), minimal(trial_seed=1, loader="reference")) == expected


@pytest.mark.parametrize(
    ("key", "one", "other", "expected"),
    [
        ("hparams", None, '{"lr": 0.1}', ("lr=default", "lr=0.1")),
        ("hparams", '{"lr": 0.2}', '{"lr": 0.1}', ("lr=0.2", "lr=0.1")),
        ("steps", 100, 200, ("steps=100", "steps=200")),
        ("steps", None, 200, ("steps=default", "steps=200")),
        ("holdout_fraction", 0.2, 0.1, ("holdout_fraction=0.2", "holdout_fraction=0.1")),
        ("eval_images", None, 64, ("eval_images=default", "eval_images=64")),
        ("uda_holdout_fraction", 0.0, 0.2, ("uda_holdout_fraction=0", "uda_holdout_fraction=0.2")),
        ("task", "a", "b", ("task=a", "task=b")),
        ("precision", "fp32", "bf16", ("precision=fp32", "precision=bf16")),
        ("loader", "batched", "reference", ("loader=batched", "loader=reference")),
    ],
)
def test_runs_of_different_protocols_are_rows_of_their_own(key, one, other, expected):
    result = collected(
        [minimal(**{key: one}), minimal(trial_seed=1, **{key: other}), minimal(trial_seed=2, **{key: one})]
    )
    assert [run.row for run in result.runs] == [f"ERM ({expected[i]})" for i in (0, 1, 0)]
    assert result.frame["row"].tolist() == [run.row for run in result.runs]
    name = expected[0].partition("=")[0]
    (note,) = result.notes
    assert note == (
        f"runs of 'ERM' on PACS differ in {name}, so each value has its own row: "
        f"'ERM ({expected[0]})' (2 runs), 'ERM ({expected[1]})' (1 runs)"
    )


def test_weights_and_image_size_are_part_of_the_protocol():
    openai, laion = (
        {"clip_model": "ViT-B-16", "clip_pretrained": name, "lr": lr} for name, lr in (("openai", 1), ("l", 2))
    )
    assert rows(minimal() | {"hparams": openai}, minimal(trial_seed=1) | {"hparams": laion}) == [
        "ERM (clip_pretrained=openai)",
        "ERM (clip_pretrained=l)",
    ]
    assert rows(minimal() | {"image_size": 64}, minimal(trial_seed=1) | {"image_size": 224}) == [
        "ERM (image_size=64)",
        "ERM (image_size=224)",
    ]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"backbone": "resnet50"}, {"backbone": "clip"}, ["backbone=resnet50", "backbone=clip"]),
        ({"lr": 1}, {"clip_model": "B"}, ["clip_model=none", "clip_model=B"]),
        ({}, {"clip_model": "B"}, []),
    ],
)
def test_a_run_without_pretrained_weights_is_no_run_with_them(one, other, expected):
    result = rows(minimal() | {"hparams": one}, minimal(trial_seed=1) | {"hparams": other})
    assert result == [f"ERM ({words})" for words in expected] or (not expected and result == ["ERM", "ERM"])


def test_an_override_of_weights_that_is_what_others_have_anyway_is_no_other_protocol():
    same = {"clip_model": "B", "clip_pretrained": "openai"}
    overridden = minimal(hparams='{"clip_pretrained": "openai"}') | {"hparams": same}
    assert rows(overridden, minimal(trial_seed=1, hparams=None) | {"hparams": same}) == ["ERM", "ERM"]


def test_what_runs_must_share_to_be_averaged():
    names = {"algorithm", "steps", "holdout_fraction", "uda_holdout_fraction", "eval_images", "task", "precision"}
    assert set(PROTOCOL) == names | {"loader"}  # which records of earlier versions have


def test_planned_jobs_leave_out_defaults_and_share_the_row_all_the_same(tmp_path):
    args = {"algorithm": "LoRA", "dataset": "PACS", "test_envs": [0]}
    jobs = launched(tmp_path / "a", [{**args, "trial_seed": t} for t in range(3)], done=False)
    for job in jobs[:2]:
        accs = {f"env{i}_{split}_acc": 0.5 for i in range(4) for split in ("in", "out")}
        written = {**PROTOCOL, **job.args, "hparams": None}
        write(job.folder, {"args": written, "hparams": {"clip_model": "B"}, "step": 0, **accs})
    shutil.rmtree(jobs[2].folder)
    launched(tmp_path / "b", [{**args, "steps": 9, "hparams": '{"lr": 1}'}])
    result = load_runs(tmp_path)
    assert [run.row for run in result.runs] == ["LoRA (steps=default, lr=default)"] * 2 + ["LoRA (steps=9, lr=1)"]
    assert [plan.row for plan in result.planned] == ["LoRA (steps=default, lr=default)"] * 3 + ["LoRA (steps=9, lr=1)"]


@pytest.mark.parametrize("copy", ["folder", "lines"])
def test_a_run_that_is_there_twice_is_said(tmp_path, copy):
    write(tmp_path / "a", minimal(), minimal() | {"step": 1})
    assert load_runs(tmp_path).notes == []
    if copy == "folder":
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    else:
        write(tmp_path / "a", *[minimal() | {"step": step} for step in (0, 1, 1)])
    folders = [str(tmp_path / name) for name in ("ab" if copy == "folder" else "a")]
    (note,) = load_runs(tmp_path).notes
    assert note.startswith("records of one run exist more than once") and f": {' and '.join(folders)}; " in note


def test_a_run_that_was_resumed_under_other_versions_has_both(tmp_path):
    versions = [{"commit": name} for name in "aab"]
    write(tmp_path / "run", *[minimal() | {"step": i, "versions": v} for i, v in enumerate(versions)])
    assert load_runs(tmp_path).runs[0].versions == [{"commit": "a"}, {"commit": "b"}]


def test_two_algorithms_under_one_label_are_told_apart():
    assert rows(minimal(label="mine"), minimal(algorithm="LoRA", label="mine")) == [
        "mine (algorithm=ERM)",
        "mine (algorithm=LoRA)",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hparams": '{"lr": 0.1, "rank": 4}'}, {"hparams": '{"rank":4,"lr":1e-1}'}),
        ({"hparams": None}, {"hparams": "{}"}),
        ({"steps": 100}, {}),
        ({"steps": 100}, {"steps": 100.0}),
        ({"steps": 100}, {"steps": 200, "dataset": "VLCS"}),
        ({"steps": 100}, {"steps": 100, "trial_seed": 3, "hparams_seed": 5, "test_envs": [1, 2], "seed": 7}),
    ],
)
def test_one_protocol_is_one_row(one, other):
    result = collected([minimal(**one), minimal(**{"trial_seed": 1, **other})])
    assert {run.row for run in result.runs} == {"ERM"} and not result.notes


def test_planned_jobs_share_the_rows_of_their_runs(tmp_path):
    args = [{"algorithm": "ERM", "dataset": "PACS", "test_envs": [0], "trial_seed": t, "steps": 5} for t in (0, 1)]
    launched(tmp_path / "sweep", args)
    write(tmp_path / "longer", record(0, 0.5, steps=9, holdout_fraction=0.2))
    result = load_runs(tmp_path)
    assert [run.row for run in result.runs] == ["ERM (steps=9)", "ERM (steps=5)", "ERM (steps=5)"]
    assert [(planned.row, planned.done) for planned in result.planned] == [("ERM (steps=5)", True)] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (text, "is not a sweep file")
            for text in ("{", "[1]", '{"rows": [1], "jobs": []}', '{"rows": [], "jobs": [{}]}')
        ),
        (
            '{"rows": [], "jobs": [{"folder": "a", "args": {"algorithm": "ERM"}}]}',
            "a job of .* has no args.dataset, args",
        ),
    ],
)
def test_a_broken_sweep_file_is_refused(tmp_path, text, said):
    write(tmp_path / "run", minimal())
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_runs(tmp_path)


def test_a_sweep_file_that_cannot_be_read_is_not_to_be_deleted(tmp_path):
    (tmp_path / "sweep.json").mkdir()
    with pytest.raises(UsageError, match="sweep.json: cannot be read: Is a directory. Check its permissions"):
        load_sweep(tmp_path)


def test_domainbeds_own_sweep(shared_data: Path):
    result = load_runs(shared_data / "domainbed_sweep" / "runs")
    assert (len(result.runs), len(result.frame), result.notes) == (40, 200, [])
    lines = (Path(result.runs[7].folder) / "results.jsonl").read_text().splitlines()
    ours = result.frame[result.frame["run"] == 7]
    for line, (_, row) in zip(lines, ours.iterrows(), strict=True):
        theirs = json.loads(line)
        assert all(row[name] == value for name, value in theirs.items() if isinstance(value, float))


def test_a_run_that_was_resumed_elsewhere_or_by_another_version_is_one_run() -> None:
    old = record(0, 0.5, data_dir="a", imports=[], loader="batched")
    new = record(0, 0.6, data_dir="b", imports=[]) | {"step": 5}
    other = record(0, 0.7, data_dir="b", imports=[], steps=7) | {"step": 9}
    result = collect_records([("run", old), ("run", new), ("run", other)])
    assert result.frame["run"].tolist() == [0, 0, 1] and len(result.runs) == 2
