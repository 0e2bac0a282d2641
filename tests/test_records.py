import json
import re
import subprocess
import sys

import numpy as np
import pytest
from made_records import write
from short_runs import go

from domainbed_hp import records


def test_append_writes_sorted_lines_and_casts_numpy(tmp_path):
    scalars = {"step": np.int64(3), "loss": np.float32(0.5), "env0_in_acc": np.float64(0.1), "flag": np.bool_(True)}
    records.append_record(tmp_path, {**scalars, "args": {"test_envs": (0, 1), "output_dir": tmp_path}})
    records.append_record(tmp_path, {"b": 1, "a": float("nan")})
    first, second = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert list(json.loads(first)) == ["args", "env0_in_acc", "flag", "loss", "step"]
    assert json.loads(first)["args"] == {"test_envs": [0, 1], "output_dir": str(tmp_path)}
    assert first.endswith('"env0_in_acc": 0.1, "flag": true, "loss": 0.5, "step": 3}\n')
    assert second == '{"a": NaN, "b": 1}\n'


def test_append_refuses_what_json_has_no_word_for_and_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="a record cannot hold .* of type set"):
        records.append_record(tmp_path, {"step": {1, 2}})
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"step": 1, "ar', "12", "\0\0\0", "é".encode()[:1].decode("latin-1")])
def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next_record(tmp_path, torn):
    write(tmp_path, {"step": 0})
    with open(tmp_path / "results.jsonl", "a", encoding="latin-1") as file:
        file.write(torn)
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert list(records.read_records(tmp_path)) == [{"step": 0}]
    records.append_record(tmp_path, {"step": 2})
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert list(records.read_records(tmp_path)) == [{"step": 0}, {"step": 2}]


def test_a_whole_last_line_without_newline_counts(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"step": 0}\n{"step": 1}')
    records.append_record(tmp_path, {"step": 2})
    assert [record["step"] for record in list(records.read_records(tmp_path))] == [0, 1, 2]


def test_an_empty_or_absent_file_holds_no_records(tmp_path):
    assert list(records.read_records(tmp_path)) == []
    (tmp_path / "results.jsonl").touch()
    assert list(records.read_records(tmp_path)) == []


def test_the_last_record_is_read_from_the_end(tmp_path, monkeypatch):
    assert records.last_record(tmp_path) is None
    write(tmp_path, {"step": 0}, {"step": 1, "args": {"a": {"b": 1}}})
    whole = (tmp_path / "results.jsonl").read_bytes()
    for torn in (b"", b'{"step": 2, "ar', b"12\n", b"\0\xff\n\n"):
        (tmp_path / "results.jsonl").write_bytes(b"\xff" * 1000 + b"\n" + whole + torn)
        for tail in (80, 5000):
            monkeypatch.setattr(records, "TAIL_BYTES", tail)
            assert records.last_record(tmp_path) == {"step": 1, "args": {"a": {"b": 1}}}
    monkeypatch.setattr(records, "TAIL_BYTES", 20)
    assert records.last_record(tmp_path) is None, "only the end is read"


def test_records_after_a_step_are_removed(tmp_path):
    assert records.truncate_records(tmp_path, 3) == [] and not (tmp_path / "results.jsonl").exists()
    write(tmp_path, {"step": 0, "x": float("nan")}, {"step": 3, "x": 0.1}, {"step": 4})
    assert records.truncate_records(tmp_path, 3) == [0, 3]
    assert (tmp_path / "results.jsonl").read_text() == '{"step": 0, "x": NaN}\n{"step": 3, "x": 0.1}\n'
    assert records.truncate_records(tmp_path, -1) == [] and (tmp_path / "results.jsonl").read_text() == ""


def test_every_key_is_documented(tmp_path):
    logged = {"ce", "mmd", "val_mmd", "gate_shift"}
    (record, *_) = go(tmp_path / "run", steps=1)
    undocumented = {key for key in record if not re.fullmatch(r"env\d_(in|out)_acc", key)} - set(
        records.Record.__annotations__
    )
    assert undocumented == logged


def test_neither_torch_nor_numpy_is_needed():
    code = "import sys, domainbed_hp.records\nassert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
