from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make

from domainbed_hp import keep, records
from domainbed_hp.networks import clip
from domainbed_hp.training.loop import train
from domainbed_hp.training.setup import RunArgs, opened

MINI = '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "keeping", True)


def test_nothing_is_kept_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    square = keep.kept(lambda x: calls.append(x) or x * x)
    assert [square(3), square(3)] == [9, 9] and calls == [3, 3]
    monkeypatch.setattr(keep, "keeping", True)
    assert [square(4), square(4)] == [16, 16] and calls == [3, 3, 4]


def outcome(folder: Path, jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found = []
    for i, job in enumerate(jobs):
        settings = {"dataset": "ShapesDG", "hparams": MINI, "steps": 2, "checkpoint_freq": 1, "eval_images": 8} | job
        train(RunArgs(output_dir=str(folder / str(i)), **settings))
        found.append(records.load_run(folder / str(i)))
        for record in found[-1]:
            del record["step_time"], record["elapsed_s"], record["args"]["output_dir"]
    return found


@pytest.mark.slow
def test_jobs_that_share_a_process_end_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = [
        {"algorithm": "FineTuneCLIP"},  # changes the tower that the next ones start from
        {"algorithm": "HeadPurification", "test_envs": (1,)},
        {"algorithm": "LoRA", "seed": 5},
        {"algorithm": "ZeroShotCLIP"},
        {"algorithm": "LoRA", "hparams": MINI.replace("shapes", "random")},
        {"algorithm": "LoRA", "hparams": MINI.replace("shapes", "random"), "seed": 1},
    ]
    alone = outcome(tmp_path / "alone", jobs)
    loads, create = [0], clip._create
    monkeypatch.setattr(clip, "_create", lambda source: (loads.__setitem__(0, loads[0] + 1), create(source))[1])
    monkeypatch.setattr(keep, "keeping", True)
    assert outcome(tmp_path / "together", jobs) == alone
    assert loads == [3]  # the pretrained one once, random ones each time


def test_data_are_opened_once(keeping: None) -> None:
    pixels = type(make("LoRA")).preprocess(make("LoRA").hparams, 64)
    assert opened("ShapesDG", None, pixels) is opened("ShapesDG", None, pixels)
    assert opened("ShapesDG", None, pixels) is not opened("Debug28", None, pixels)


def test_a_clip_is_drawn_from_no_global_generator(keeping: None) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = clip.load_clip("mini", "shapes")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        next(first.visual.parameters()).zero_()
    assert next(clip.load_clip("mini", "shapes").visual.parameters()).abs().sum() > 0
    prompts = ["a photo of a dog.", "a photo of a key."]
    features = first.text_features(prompts)
    features.zero_()
    assert first.text_features(prompts).norm(dim=1).allclose(torch.ones(2))
