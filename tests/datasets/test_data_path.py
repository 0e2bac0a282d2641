"""Each data set in its real layout, from the server to two training steps."""

from pathlib import Path

import pytest
from loopback import Loopback
from made_archives import MAKERS

from domainbed_hp.registry import DATASETS
from domainbed_hp.scripts import download, prepare, train

MINI = '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'


@pytest.mark.parametrize("name", MAKERS)
def test_from_the_server_to_two_training_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, data = tmp_path / "shelf", ["--data_dir", str(tmp_path / "data")]
    shelf.mkdir()
    with Loopback() as server:
        spec = MAKERS[name](shelf, server.url)
        server.files |= {f"/{path.name}": path for path in shelf.iterdir()}
        monkeypatch.setitem(DATASETS, name, spec)
        assert download.main([*data, "--datasets", name]) == 0
    assert download.main([*data, "--datasets", name, "--check"]) == 0
    assert prepare.main([*data, "--dataset", name, "--image_size", "64"]) == 0
    run = ["--dataset", name, "--test_envs", "1", "--steps", "2", "--hparams", MINI]
    assert train.main([*data, *run, "--eval_images", "6", "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "done").exists()
    assert "Images: prepared, raw" in (tmp_path / "run" / "out.txt").read_text()
