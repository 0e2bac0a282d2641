import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import make

from domainbed_hp.networks import clip
from domainbed_hp.networks.clip import MINI, find_clip, load_clip
from domainbed_hp.prompts.base import make_prompts
from domainbed_hp.registry import UsageError


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("RN50-quickgelu", "openai", "'RN50-quickgelu' has a ResNet tower"),
        ("ViT-B-16-SigLIP", "webli", r"'ViT-B-16-SigLIP' has a timm tower"),
        ("convnext_base", "laion400m_s13b_b51k", r"'convnext_base' has a timm tower"),
        ("coca_ViT-B-32", "random", "without class-token pooling"),
        ("ViT-B-16", "openai", "have another GELU than 'ViT-B-16': pass clip_model=ViT-B-16-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "is no file and no known tag"),
        ("ViT-B-61", "openai", "Did you mean 'ViT-B-16'"),
        ("ViT-B-16", "opennai", "is no file and no known tag"),
        ("ViT-B-16", "/nowhere/clip.pt", "local-dir:FOLDER"),
        ("mini", "shape", "is no file and no known tag"),
        ("mini", "local-dir:/nowhere", "cannot read open_clip_config.json"),
    ],
)
def test_refused(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_clip(model, pretrained)


def test_no_network_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(UsageError, match="Name or service not known[^$]*clip_pretrained=PATH"):
        load_clip("ViT-B-32-quickgelu", "openai")


def test_broken_checkpoint_says_what_to_pass(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "clip.pt")
    with pytest.raises(UsageError, match="cannot load CLIP .*clip.pt"):
        load_clip("mini", str(tmp_path / "clip.pt"))


def test_preprocessing_belongs_to_the_weights(tmp_path: Path) -> None:
    assert find_clip("ViT-B-16-quickgelu", "openai").preprocess[:3] == (224, "crop", "bicubic")
    assert find_clip("ViT-L-14-336-quickgelu", "openai").preprocess[:3] == (336, "crop", "bicubic")
    assert find_clip("mini", "shapes").preprocess[:3] == (64, "crop", "bicubic")
    config = json.loads((MINI / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    shutil.copytree(MINI, tmp_path / "m")
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps(config))
    source = find_clip("mini", f"local-dir:{tmp_path}/m")
    assert source.preprocess[:3] == (64, "squash", "bilinear")
    tower = load_clip("mini", f"local-dir:{tmp_path}/m").visual
    torch.testing.assert_close(tower.normalise.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_checkpoint_file_gives_the_same_model(tmp_path: Path) -> None:
    stock = open_clip.create_model(f"local-dir:{MINI}")
    torch.save(stock.state_dict(), tmp_path / "clip.pt")
    a, b = load_clip("mini", str(tmp_path / "clip.pt")), load_clip("mini", "shapes")
    for (name, p), q in zip(a.visual.named_parameters(), b.visual.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert a.logit_scale == b.logit_scale == pytest.approx(stock.logit_scale.exp().item())


def test_text_features_equal_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(["dog", "alarm_clock"])
    assert prompts == ["a photo of a dog.", "a photo of a alarm clock."]
    monkeypatch.chdir(MINI)  # where stock open_clip finds the relative bpe_path
    stock = open_clip.create_model("local-dir:.").eval()
    with torch.no_grad():
        expected = stock.encode_text(open_clip.get_tokenizer("local-dir:.")(prompts), normalize=True)
    torch.testing.assert_close(load_clip("mini", "shapes").encode_prompts(prompts), expected, atol=1e-6, rtol=0)


def test_template_needs_one_place_for_the_name() -> None:
    with pytest.raises(UsageError, match="expected one {}"):
        make_prompts(["dog"], "a photo.")


def test_text_tower_is_dropped() -> None:
    names = [name for name, _ in make("HeadPurification").named_parameters()]
    assert names and all(name.startswith("tower.") for name in names)


def test_random_weights_cannot_be_exported(tmp_path: Path) -> None:
    source = find_clip("mini", "random")
    with pytest.raises(UsageError, match="cannot be exported"):
        clip.export_clip(source, {}, tmp_path)


def test_weights_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    source = find_clip("mini", "shapes")
    weights = {k: v for k, v in clip.create_model(source).state_dict().items() if k.startswith("visual.")}
    weights["visual.proj"] = weights["visual.proj"].T[:5]
    with pytest.raises(ValueError, match=r"visual.proj: got \(5, 160\), expected \(160, \d+\). `merge` returns"):
        clip.export_clip(source, weights, tmp_path)


@pytest.mark.parametrize("pretrained", ["shapes", "random"])
def test_loading_draws_nothing_from_the_global_generator(pretrained: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_clip("mini", pretrained)
    assert torch.equal(torch.get_rng_state(), before)
