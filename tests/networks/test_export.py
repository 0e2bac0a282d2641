"""Trained models as plain CLIP checkpoints, loaded by stock open_clip in a process without this package."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import images, make, randomize

from domainbed_hp.prompts.base import make_prompts
from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run
from domainbed_hp.scripts.export import main as export
from domainbed_hp.scripts.train import main as train
from domainbed_hp.training.model_io import ModelSpec, save_model

STOCK = """
import sys, torch, open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
model.eval()
images, prompts = torch.load("../input.pt")
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
with torch.no_grad():
    a = model.encode_image((images - mean) / std, normalize=True)
    b = model.encode_text(open_clip.get_tokenizer("local-dir:.")(prompts), normalize=True)
assert "domainbed_hp" not in sys.modules
torch.save(model.logit_scale.exp() * a @ b.T, "../logits.pt")
"""


def logits_of_stock_open_clip(folder: Path, x: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    torch.save((x, prompts), folder.parent / "input.pt")
    subprocess.run([sys.executable, "-c", STOCK], cwd=folder, check=True, timeout=300)
    return torch.load(folder.parent / "logits.pt")


@pytest.mark.parametrize(
    ("algorithm", "hparams"),
    [
        ("HeadPurification", {"lora_targets": "qkvo"}),
        pytest.param("HeadPurification", {"gates": "sigmoid"}, marks=pytest.mark.slow),
        pytest.param("LoRA", {"lora_targets": "qkvo"}, marks=pytest.mark.slow),
        pytest.param("FineTuneCLIP", {"lr": 1e-3}, marks=pytest.mark.slow),
        pytest.param("CLIPLoRA", {}, marks=pytest.mark.slow),
    ],
)
def test_exported_folder_gives_the_same_logits(tmp_path: Path, algorithm: str, hparams: dict) -> None:
    model = make(algorithm, **hparams)
    zero_shot = model.eval().predict(images(3)).detach()
    randomize(model)
    if algorithm == "FineTuneCLIP":
        model.update([(images(4), torch.tensor([0, 1, 2, 0]))])
    hparams = {k: v for k, v in model.hparams.items() if k != "class_names"}
    recipe = ModelSpec(algorithm, hparams, 1, 64, tuple(model.hparams["class_names"]), 3)
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / "model.safetensors", model, recipe)
    assert run(export, [str(tmp_path / "run"), str(tmp_path / "clip")]) == 0

    expected = model.eval().predict(images(3)).detach()
    prompts = make_prompts(recipe.class_names)
    logits = logits_of_stock_open_clip(tmp_path / "clip", images(3), prompts)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (zero_shot - expected).abs().max() > 1e-2


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(export, [str(tmp_path), str(tmp_path / "clip")]) == 2
    assert "no model.safetensors" in capsys.readouterr().err
    erm = ["--algorithm", "ERM", "--dataset", "Debug28", "--steps", "1", "--output_dir", str(tmp_path / "erm")]
    assert run(train, erm) == 0
    assert run(export, [str(tmp_path / "erm"), str(tmp_path / "clip")]) == 2
    assert "ERM has no CLIP to export" in capsys.readouterr().err


@pytest.mark.slow
def test_vit_b_16_from_a_checkpoint_file_to_stock_open_clip(tmp_path: Path, shared_data: Path) -> None:
    """Train at 224 px for two steps on a few PACS images, save, export, reload."""
    data = tmp_path / "data" / "PACS"
    for folder in sorted((shared_data / "PACS").glob("*/*")):
        (data / folder.parent.name / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:2]:
            (data / folder.parent.name / folder.name / image.name).symlink_to(image)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-16-quickgelu").state_dict(), tmp_path / "clip.pt")
    hparams = {"clip_pretrained": str(tmp_path / "clip.pt"), "batch_size": 2, "lr": 0.01}
    argv = ["--dataset", "PACS", "--data_dir", str(data.parent), "--steps", "2", "--checkpoint_freq", "2",
            "--eval_images", "2", "--hparams", json.dumps(hparams), "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert run(train, argv) == 0
    assert run(export, [str(tmp_path / "run"), str(tmp_path / "exported")]) == 0

    from domainbed_hp.training.model_io import load_model

    algorithm, recipe = load_model(tmp_path / "run")
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = algorithm.predict(x)
        start = make("ZeroShotCLIP", clip_model="ViT-B-16-quickgelu", clip_pretrained=str(tmp_path / "clip.pt"))
    logits = logits_of_stock_open_clip(tmp_path / "exported", x, make_prompts(recipe.class_names))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    moved = algorithm.tower.merge()["visual.transformer.resblocks.11.attn.in_proj_weight"]
    assert not torch.equal(moved, start.tower.merge()["visual.transformer.resblocks.11.attn.in_proj_weight"])


@pytest.mark.parametrize("prompt", ["coop", "from_text", "random"])
def test_a_classifier_that_is_no_text_of_clips_is_not_dropped_in_silence(prompt: str) -> None:
    with pytest.raises(UsageError, match=f"prompt={prompt}.*image tower alone"):
        make("FineTuneCLIP", prompt=prompt).merge()
