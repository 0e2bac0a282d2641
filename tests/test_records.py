import json
import os

import numpy as np
import pytest

from domainbed_hp import records
from domainbed_hp.registry import UsageError


def minimal(**args):
    """The least that DomainBed's collector accepts."""
    args = {"algorithm": "ERM", "dataset": "PACS", "hparams_seed": 0, "test_envs": [0], "trial_seed": 0, **args}
    outs = {f"env{i}_out_acc": 0.5 for i in range(3)}
    return {"args": args, "step": 0, **outs, **{f"env{i}_in_acc": 0.25 for i in args["test_envs"]}}


def write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_append_writes_sorted_lines_and_casts_numpy(tmp_path):
    scalars = {"step": np.int64(3), "loss": np.float32(0.5), "env0_in_acc": np.float64(0.1), "flag": np.bool_(True)}
    records.append(tmp_path, {**scalars, "args": {"test_envs": (0, 1), "output_dir": tmp_path}})
    records.append(tmp_path, {"b": 1, "a": float("nan")})
    first, second = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert list(json.loads(first)) == ["args", "env0_in_acc", "flag", "loss", "step"]
    assert json.loads(first)["args"] == {"test_envs": [0, 1], "output_dir": str(tmp_path)}
    assert first.endswith('"env0_in_acc": 0.1, "flag": true, "loss": 0.5, "step": 3}\n')
    assert second == '{"a": NaN, "b": 1}\n'


def test_append_refuses_what_json_has_no_word_for_and_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="a record cannot hold .* of type set"):
        records.append(tmp_path, {"step": {1, 2}})
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"step": 1, "ar', "12", "\0\0\0", "é".encode()[:1].decode("latin-1")])
def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next_record(tmp_path, torn):
    write(tmp_path, {"step": 0})
    with open(tmp_path / "results.jsonl", "a", encoding="latin-1") as file:
        file.write(torn)
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert records.load_run(tmp_path) == [{"step": 0}]
    records.append(tmp_path, {"step": 2})
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert records.load_run(tmp_path / "results.jsonl") == [{"step": 0}, {"step": 2}]


def test_a_whole_last_line_without_newline_counts(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"step": 0}\n{"step": 1}')
    records.append(tmp_path, {"step": 2})
    assert [record["step"] for record in records.load_run(tmp_path)] == [0, 1, 2]


def test_an_empty_or_absent_file_holds_no_records(tmp_path):
    assert records.load_run(tmp_path) == []
    (tmp_path / "results.jsonl").touch()
    assert records.load_run(tmp_path) == []


def test_load_finds_nested_runs_in_sorted_order_once(tmp_path):
    for name in ("b/run", "a/deep/run", "c"):
        write(tmp_path / name, minimal(), minimal())
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    elsewhere = tmp_path.with_name("elsewhere")
    write(elsewhere / "run", minimal())
    (tmp_path / "d").symlink_to(elsewhere)
    found = [os.path.relpath(record["run_dir"], tmp_path) for record in records.load(tmp_path)]
    assert found == ["a/deep/run"] * 2 + ["b/run"] * 2 + ["c"] * 2 + ["d/run"]


def test_load_refuses_what_is_not_a_readable_folder(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="cannot read .*absent: No such file"):
        records.load(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot read .*file: Not a directory"):
        records.load(tmp_path / "file")
    write(tmp_path / "run", minimal())
    monkeypatch.setattr(records, "load_run", lambda path: tmp_path.read_text())
    with pytest.raises(UsageError, match="Is a directory"):
        records.load(tmp_path)


def test_frame_of_a_minimal_record():
    (row,) = records.frame([minimal(test_envs=[2, 0], label=None)]).to_dict("records")
    assert row == {
        **{"row": "ERM", "algorithm": "ERM", "dataset": "PACS", "trial_seed": 0, "hparams_seed": 0},
        **{"test_envs": (2, 0), "step": 0, "num_envs": 3, "env0_in_acc": 0.25, "env2_in_acc": 0.25},
        **{f"env{i}_out_acc": 0.5 for i in range(3)},
    }


def test_frame_takes_the_label_as_row_and_counts_environments_without_a_gap():
    record = minimal(label="ERM, frozen") | {"env4_out_acc": 0.5, "env0_uda_acc": 0.5}
    frame = records.frame([record])
    assert frame["row"].tolist() == ["ERM, frozen"]
    assert frame["num_envs"].tolist() == [3]
    assert "env0_uda_acc" not in frame


@pytest.mark.parametrize("key", ["step", "args", "env0_in_acc", "env0_out_acc"])
def test_frame_names_what_a_record_lacks(key):
    record = {**minimal(), "run_dir": "sweep/run7"}
    del record[key]
    with pytest.raises(UsageError, match=f"a record of sweep/run7 has no {key}; it needs"):
        records.frame([record])


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("hparams", None, '{"lr": 0.1}'),
        ("hparams", '{"lr": 0.2}', '{"lr": 0.1}'),
        ("steps", 100, 200),
        ("steps", None, 200),
        ("holdout_fraction", 0.2, 0.1),
        ("eval_images", None, 64),
    ],
)
def test_runs_of_different_protocols_are_refused(key, one, other):
    a = {**minimal(**{key: one}), "run_dir": "sweep/a"}
    b = {**minimal(trial_seed=1, **{key: other}), "run_dir": "sweep/b"}
    with pytest.raises(UsageError) as error:
        records.check_protocol([a, a, b])
    for part in (f"differ in {key}: {one!r} in sweep/a, {other!r} in sweep/b", "row 'ERM' on PACS", "--label"):
        assert part in str(error.value)


def test_two_algorithms_under_one_label_are_refused():
    with pytest.raises(UsageError, match="differ in algorithm: 'ERM' in .*, 'LoRA' in"):
        records.check_protocol([minimal(label="mine"), minimal(algorithm="LoRA", label="mine")])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hparams": '{"lr": 0.1, "rank": 4}'}, {"hparams": '{"rank":4,"lr":1e-1}'}),
        ({"hparams": None}, {"hparams": "{}"}),
        ({"steps": 100}, {}),
        ({"steps": 100}, {"steps": 200, "label": "ERM, longer"}),
        ({"steps": 100}, {"steps": 200, "dataset": "VLCS"}),
        ({"steps": 100}, {"steps": 100, "trial_seed": 3, "hparams_seed": 5, "test_envs": [1, 2], "seed": 7}),
    ],
)
def test_one_protocol_passes(one, other):
    records.check_protocol([minimal(**one), minimal(**other)])
