import json

import numpy as np
import pytest
from made_records import write

from domainbed_hp import records


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
