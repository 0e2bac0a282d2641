"""The embedded CLIP: loads in stock open_clip, knows ShapesDG roughly, and its script runs."""

import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy

from domainbed_hp.datasets.shapes.shapes_dg import CLASS_NAMES, ENVIRONMENTS, build
from domainbed_hp.scripts import pretrain_mini

MINI = pretrain_mini.MINI


@pytest.fixture(scope="module")
def stock():
    """Model, preprocessing and tokenizer, from inside the folder because `bpe_path` is relative."""
    before = Path.cwd()
    os.chdir(MINI)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
        return model.eval(), preprocess, open_clip.get_tokenizer("local-dir:.")
    finally:
        os.chdir(before)


def test_weights_are_small():
    assert (MINI / "open_clip_model.safetensors").stat().st_size <= 5_000_000


def test_towers_are_as_configured(stock):
    model, _, tokenize = stock
    cfg = json.loads((MINI / "open_clip_config.json").read_text())["model_cfg"]
    blocks = model.visual.transformer.resblocks
    assert len(blocks) == cfg["vision_cfg"]["layers"] and blocks[0].attn.head_dim == cfg["vision_cfg"]["head_width"]
    assert tokenize(["a photo of a fish."]).shape == (1, cfg["text_cfg"]["context_length"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.4e6, rel=0.02)


@torch.no_grad()
def test_zero_shot_leaves_something_to_learn_and_something_to_lose(stock):
    model, preprocess, tokenize = stock
    text = model.encode_text(tokenize([f"a photo of a {name}." for name in CLASS_NAMES]), normalize=True)
    accuracies = []
    for env in build():
        chosen = range(0, len(env), 6)
        x = torch.stack([preprocess(env[i]) for i in chosen])
        accuracies.append(((model.encode_image(x) @ text.T).argmax(1).numpy() == env.labels[::6]).mean())
    assert 0.55 <= np.mean(accuracies) <= 0.85, dict(zip(ENVIRONMENTS, accuracies, strict=True))
    assert min(accuracies) > 0.3


def test_truncated_captions_are_encoded_exactly(stock):
    model, _, tokenize = stock
    texts = ["cup", "a blueprint of a butterfly."]
    with torch.no_grad():
        ours = pretrain_mini.Captions().encode(model, texts)
        torch.testing.assert_close(ours, model.encode_text(tokenize(texts), normalize=True), atol=1e-5, rtol=1e-4)


def test_loss_is_clip_s_where_each_image_has_one_caption():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(pretrain_mini.compute_contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


@pytest.mark.slow
def test_script_makes_a_loadable_model(tmp_path, monkeypatch):
    argv = ["--output_dir", str(tmp_path), "--images", "40", "--steps", "1", "1", "2", "--batch_size", "4"]
    assert pretrain_mini.main(argv) == 0
    monkeypatch.chdir(tmp_path)
    made = open_clip.create_model("local-dir:.")
    shipped = (MINI / "open_clip_model.safetensors").stat().st_size
    assert (tmp_path / "open_clip_model.safetensors").stat().st_size == shipped
    assert made.visual.image_size == (64, 64)
