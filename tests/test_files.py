import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from domainbed_hp import records, run_dir
from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.loop import train

ZERO = '{"clip_model": "mini", "clip_pretrained": "shapes"}'
MINI = '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with replace_atomically(path) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_text(text)
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replace_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_of_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "my.tmp").touch()
    with replace_atomically(tmp_path / "checkpoint.pt") as temporary:
        temporary.touch()
        os.link(temporary, tmp_path / temporary.name.replace(str(os.getpid()), "12"))
    (tmp_path / "checkpoint.pt").unlink()
    train(RunArgs(output_dir=str(tmp_path), dataset="Debug28", algorithm="ZeroShotCLIP", hparams=ZERO))
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["my.tmp"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.name == "posix" and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]).returncode:
        pytest.skip("no small file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def records_of(folder: Path) -> list[dict[str, object]]:
    lines = list(records.read_records(folder))
    return [{k: v for k, v in r.items() if k not in ("step_time", "elapsed_s", "args")} for r in lines]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("free", [pytest.param(16_000, marks=SLOW), 60_000, pytest.param(250_000, marks=SLOW)])
def test_a_full_disk_is_named_loses_nothing_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, tmp_path: Path, free: int
) -> None:
    settings = {"dataset": "Debug28", "algorithm": "LoRA", "hparams": MINI, "steps": 5, "checkpoint_freq": 2}
    train(RunArgs(output_dir=str(tmp_path / "whole"), **settings))
    run = RunArgs(output_dir=str(small_disk / "run"), **settings)
    (small_disk / "run").mkdir()
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        room = shutil.disk_usage(small_disk).free - free
        file.write(bytes(max(0, room)))
    with pytest.raises(Exception, match="No space left on device"):
        train(run)
    whole_lines = records_of(small_disk / "run")
    assert whole_lines == records_of(tmp_path / "whole")[: len(whole_lines)]
    assert run_dir.read_state(small_disk / "run") == run_dir.State.FAILED
    assert "No space left on device" in run_dir.read_failure(small_disk / "run")
    ballast.unlink()
    train(run)
    assert records_of(small_disk / "run") == records_of(tmp_path / "whole")
    assert run_dir.read_state(small_disk / "run") == run_dir.State.DONE


def test_a_disk_without_any_room_is_told_before_anything_starts(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    with open(small_disk / "ballast", "wb", buffering=0) as file:
        file.write(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(UsageError, match="cannot be written to: No space left on device"):
        train(RunArgs(output_dir=str(small_disk / "run"), dataset="Debug28", algorithm="LoRA", hparams=MINI))
    assert run_dir.read_state(small_disk / "run") == run_dir.State.INCOMPLETE
