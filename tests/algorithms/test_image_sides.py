"""The loss and the layers of each image side, against computations written out here."""

import copy
import math
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import batches, images, make, randomize
from torch import Tensor

from domainbed_hp.algorithms.clip_algorithm import unfreeze
from domainbed_hp.hparams_registry import default_hparams, resolve_hparams
from domainbed_hp.networks import clip
from domainbed_hp.networks.preprocess import IMAGENET_MEAN, IMAGENET_STD
from domainbed_hp.registry import UsageError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def stock(state: dict[str, Tensor] | None = None) -> Any:
    """open_clip's own model of the embedded CLIP, with some weights replaced."""
    model = open_clip.create_model(f"local-dir:{clip.MINI}").eval()
    assert not model.load_state_dict(state or {}, strict=False).unexpected_keys
    return model


def normalised(x: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def trained(algorithm: Any, steps: int = 2) -> Any:
    for step in range(steps):
        algorithm.update(batches(seed=step))
    return algorithm


def joined(minibatches: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])


def text_of(algorithm: Any, images: Tensor) -> Tensor:
    """Text features (B, C, E), whether images have their own or not."""
    text: Tensor = algorithm.text.compute_class_features(images, [4, 4, 4])
    return text if text.dim() == 3 else text.expand(len(images), -1, -1)


def moved(before: dict[str, Tensor], algorithm: Any) -> set[str]:
    return {name for name, p in algorithm.named_parameters() if not torch.equal(before[name], p)}


def weights(algorithm: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in algorithm.named_parameters()}


# CLIP-Adapter


def test_adapter_mixes_feature_and_mlp() -> None:
    a = make("CLIPAdapter", adapter_ratio=0.3)
    w1, w2 = a.adapter[0].weight, a.adapter[2].weight
    assert w1.shape == (32, 128) and w2.shape == (128, 32)
    f = F.normalize(stock().encode_image(normalised(images(5))), dim=-1)
    mixed = 0.3 * torch.relu(torch.relu(f @ w1.T) @ w2.T) + 0.7 * f
    expected = F.normalize(mixed, dim=-1) @ a.text.features.T
    torch.testing.assert_close(a.predict(images(5)) / a.logit_scale, expected, atol=2e-6, rtol=0)


def test_adapter_takes_features_in_place_of_images() -> None:
    a, b = make("CLIPAdapter"), make("CLIPAdapter")
    assert a.has_frozen_features(a.hparams) and not a.has_frozen_features(a.hparams | {"prompt": "maple"})
    assert not a.describe_protocol(a.hparams)["source_free"] and a.hparams["augmentation"] == "none"
    a.update(batches())
    b.update([(b.encode(x), y) for x, y in batches()])
    assert torch.equal(a.predict(images(3)), b.predict(b.encode(images(3))))
    with pytest.raises(UsageError, match="no plain CLIP"):
        a.merge()


# VPT


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_vpt_is_open_clips_tower_with_tokens(depth: str) -> None:
    a = trained(make("VPT", vpt_depth=depth, vpt_tokens=3, lr=0.1))
    tokens, visual = a.tokens.detach(), stock().visual
    assert tokens.shape == (6 if depth == "deep" else 1, 3, 160)
    x = visual.conv1(normalised(images(4))).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(4, 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, tokens[0].expand(4, -1, -1)], dim=1))
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer and depth == "deep":
            x[:, -3:] = tokens[layer]
        x = block(x)
    torch.testing.assert_close(a.encode(images(4)), visual.ln_post(x[:, 0]) @ visual.proj, atol=2e-5, rtol=1e-4)
    assert moved(weights(make("VPT", vpt_depth=depth, vpt_tokens=3)), a) == {"tokens"}


def test_vpt_starts_small_and_trains_by_sgd() -> None:
    a = make("VPT", steps=3)
    assert a.tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert isinstance(a.optimizer, torch.optim.SGD)
    assert [a.optimizer.param_groups[0][key] for key in ("lr", "momentum")] == [2.5e-3, 0.9]
    trained(a, 3)
    assert a.optimizer.param_groups[0]["lr"] < 1e-9


def test_vpt_refusals() -> None:
    with pytest.raises(UsageError, match="prompt=maple"):
        make("VPT", prompt="maple")
    with pytest.raises(UsageError, match="no CLIP has its tokens"):
        make("VPT").merge()


# LP-FT


def test_lpft_probes_then_fine_tunes_all() -> None:
    a = make("LPFT", steps=6, probe_share=0.5)
    start = weights(a)
    a.backward(batches(), 1.0)
    assert all(p.grad is None and p.requires_grad for p in a.tower.parameters())
    trained(a, 3)
    assert moved(start, a) == {"text.classifier.weight", "text.classifier.bias"}
    assert a.text_optimizer.param_groups[0]["lr"] < 1e-9 and a.optimizer.param_groups[0]["lr"] == 1e-5

    probed = weights(a)
    trained(a, 1)
    assert moved(probed, a) == set(start)
    for name, value in a.named_parameters():  # Adam's first step is as long as the learning rate
        step = value - probed[name] * (1 - 1e-5 * 0.01)
        assert step.abs().max().item() == pytest.approx(1e-5, rel=0.2), name
    trained(a, 2)
    assert a.optimizer.param_groups[0]["lr"] < 1e-9
    assert {int(state["step"]) for state in a.text_optimizer.state.values()} == {3}


def test_lpft_without_a_probe_is_fine_tuning() -> None:
    a = make("LPFT", steps=2, probe_share=0.0)
    before = weights(a)
    assert moved(before, trained(a, 1)) == set(before)


def test_lpft_goes_on_where_it_was_stopped() -> None:
    a, b = trained(make("LPFT", steps=4), 3), make("LPFT", steps=4, seed=5)
    b.load_training_state(copy.deepcopy(a.training_state()))
    assert torch.equal(trained(a, 1).predict(images(3)), trained(b, 1).predict(images(3)))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"prompt": "template", "steps": 4}, "prompt=template has no classifier to train"),
        ({"probe_share": 1.0, "steps": 4}, "less than 1"),
        ({}, "number of training steps"),
    ],
)
def test_lpft_refusals(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make("LPFT", **hparams)


# FLYP


@pytest.mark.parametrize("prompt", ["text_tower", "template", "cocoop"])
def test_flyp_contrasts_images_with_captions(prompt: str) -> None:
    a = make("FLYP", prompt=prompt)
    x, y = joined(batches())
    assert len(y) > len(set(y.tolist()))  # some captions say the same
    with torch.no_grad():
        pictures = F.normalize(a.encode(x), dim=-1)
        text = text_of(a, pictures)
    logits = np.array([[a.logit_scale * float(pictures[i] @ text[i, y[j]]) for j in range(12)] for i in range(12)])
    to_captions = [math.log(np.exp(logits[i] - logits[i, i]).sum()) for i in range(12)]
    to_images = [math.log(np.exp(logits[:, i] - logits[i, i]).sum()) for i in range(12)]
    loss = a.backward(batches(), 1.0)["contrastive"].item()
    assert loss == pytest.approx(np.mean([to_captions, to_images]), rel=1e-4)


def test_flyp_trains_both_towers_and_needs_text() -> None:
    a = make("FLYP")
    names = moved(weights(a), trained(make("FLYP"), 1))
    assert any(n.startswith("tower.") for n in names) and any(n.startswith("text.tower.") for n in names)
    with pytest.raises(UsageError, match="prompt=random"):
        make("FLYP", prompt="random")


# CLIPood


@pytest.mark.parametrize("prompt", ["template", "cocoop", "text_tower"])
def test_clipoods_margin_metric_softmax(prompt: str) -> None:
    a = make("CLIPood", prompt=prompt, margin=0.4)
    x, y = joined(batches())
    with torch.no_grad():
        pictures = F.normalize(a.encode(x), dim=-1)
        text = text_of(a, pictures)
    total = 0.0
    for picture, own, label in zip(pictures, text, y.tolist(), strict=True):
        # The paper's form: a distance is added to wrong classes; ours differs by a constant that softmax ignores.
        logits = [float(picture @ own[j]) + 0.4 * (1 - float(own[label] @ own[j])) for j in range(3)]
        total += math.log(sum(math.exp(a.logit_scale * (logit - logits[label])) for logit in logits))
    assert a.backward(batches(), 1.0)["ce"].item() == pytest.approx(total / 12, rel=1e-4)
    plain = make("CLIPood", prompt=prompt, margin=0.0).backward(batches(), 1.0)["ce"]
    torch.testing.assert_close(plain, make("FineTuneCLIP", prompt=prompt).backward(batches(), 1.0)["ce"])


def test_clipoods_margin_is_no_way_down_for_text() -> None:
    a = make("CLIPood", prompt="from_text")
    a.encode = lambda x, *_: torch.zeros(len(x), 128).fill_(1.0)  # type: ignore[method-assign]
    a.backward(batches(), 1.0)
    x, y = joined(batches())
    pictures, text = F.normalize(torch.ones(12, 128), dim=-1), a.text.weight.detach()
    logits = a.logit_scale * (pictures @ text.T - 0.3 * text[y] @ text.T)
    wrong = (logits.softmax(1) - F.one_hot(y, 3)) / 12
    torch.testing.assert_close(a.text.weight.grad, a.logit_scale * wrong.T @ pictures, atol=1e-5, rtol=1e-4)


def test_clipoods_defaults() -> None:
    assert [default_hparams("CLIPood", d)["lr"] for d in ("PACS", "OfficeHome", "DomainNet")] == [5e-6, 1e-5, 1e-5]
    chosen = default_hparams("CLIPood", "PACS")
    assert (chosen["margin"], chosen["average"], chosen["weight_decay"]) == (0.3, "beta", 0.1)
    with pytest.raises(UsageError, match="prompt=random"):
        make("CLIPood", prompt="random")


# MIRO


def features(visual: Any, x: Tensor) -> list[np.ndarray]:
    """Return the input of the first of 6 layers, and the output of the last layer of each quarter."""
    outputs: list[np.ndarray] = []

    def record_output(module: Any, inputs: Any, output: Tensor) -> None:
        outputs.append(output.detach().numpy())

    layers = [visual.ln_pre, *(visual.transformer.resblocks[i] for i in (1, 2, 4, 5))]
    handles = [layer.register_forward_hook(record_output) for layer in layers]
    visual(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("released", [False, True])
def test_miros_penalty(released: bool) -> None:
    a = trained(make("MIRO", prompt="template", lr=1e-3, miro_released_pixels=released, miro_weight=0.7))
    with torch.no_grad():
        a.variance.normal_()
    x, y = joined(batches())
    pixels = normalised(x, IMAGENET_MEAN, IMAGENET_STD) if released else normalised(x)
    tuned, before = stock(a.tower.merge()), stock()
    expected = 0.0
    for f, f0, b in zip(
        *(features(m.visual, pixels) for m in (tuned, before)), a.variance.detach().numpy(), strict=True
    ):
        var = np.log1p(np.exp(b)) + 1e-5
        expected += ((f - f0) ** 2 / var + np.log(var)).mean() / 2
    losses = a.backward(batches(), 1.0)
    assert losses["miro"].item() == pytest.approx(0.7 * expected, rel=1e-4)
    logits = a.logit_scale * F.normalize(tuned.encode_image(pixels), dim=-1) @ a.text.features.T
    expected_ce = F.cross_entropy(logits, y)
    assert losses["ce"].item() == pytest.approx(expected_ce.item(), rel=1e-3)


def test_miro_at_the_start_and_what_it_trains() -> None:
    a = make("MIRO")
    assert a.backward(batches(), 1.0)["miro"].item() == pytest.approx(5 * math.log(0.1) / 2, rel=1e-5)
    names = {name for name, p in a.named_parameters() if p.requires_grad}
    assert not any(name.startswith("pretrained") for name in {*names, *a.trained_state()})
    assert {"variance", "text.classifier.weight", "tower.proj"} <= names
    tower, variance = a.optimizer.param_groups
    assert (tower["lr"], variance["lr"], tower["weight_decay"]) == (5e-5, 5e-4, 0)
    assert [a.hparams[key] for key in ("batch_size", "augmentation")] == [32, "domainbed"]


@pytest.mark.parametrize(("layers", "ends"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (6, [1, 2, 4, 5])])
def test_miros_quarters(layers: int, ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from domainbed_hp.networks.vit import VisionTower

    monkeypatch.setattr(VisionTower, "blocks", range(layers))
    assert make("MIRO").ends == ends


def test_miro_compares_the_images_tokens_alone() -> None:
    a = trained(make("MIRO", prompt="maple"), 1)
    assert len(a.tower.prompt_tokens()) and not len(a.pretrained.prompt_tokens())
    assert math.isfinite(a.update(batches())["miro"])


def test_miros_released_pixels() -> None:
    hparams = resolve_hparams("MIRO", "PACS", 0, 0, {"clip_model": "mini", "clip_pretrained": "shapes"})
    kind = type(make("MIRO"))
    assert kind.preprocess(hparams, 224)[:3] == (64, "crop", "bicubic")
    assert kind.preprocess(hparams | {"miro_released_pixels": True}, 224)[:3] == (64, "squash", "bilinear")
    with pytest.raises(UsageError, match="other pixels"):
        make("MIRO", miro_released_pixels=True).merge()


# LoRA


@pytest.mark.parametrize("ranks", [(0, 8), (2, 0), (2, 8)])
def test_lora_may_adapt_some_layers_only(ranks: tuple[int, int]) -> None:
    a = make("LoRA", lora_rank=ranks[0], lora_rank_last=ranks[1])
    assert [p.shape[-1] for p in a.parameters() if p.requires_grad]


@pytest.mark.parametrize("own", [{"lora_rank": 0, "lora_rank_last": 0}, {"lora_targets": ""}])
def test_lora_without_adapters_is_refused(own: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="got no adapters"):
        resolve_hparams("LoRA", "PACS", 0, 0, {"clip_model": "mini", "clip_pretrained": "random"} | own)


# CLIP-LoRA


def test_clip_lora_scales_by_the_root_of_the_rank_and_merges() -> None:
    a = make("CLIPLoRA", clip_lora_rank=4, clip_lora_alpha=3.0).eval()
    randomize(a, scale=1.0)
    state = stock().state_dict()
    for i, block in enumerate(a.tower.blocks):
        assert list(block.attn.adapters) == ["q", "k", "v"]
        for row, adapter in zip((0, 160, 320), block.attn.adapters.values(), strict=True):
            low, high = adapter.lora_A[0], torch.cat([*adapter.lora_B], dim=1)  # (D, r), (r, D)
            assert low.shape == (160, 4)
            name = f"visual.transformer.resblocks.{i}.attn.in_proj_weight"
            state[name][row : row + 160] += 3.0 / math.sqrt(4) * (low @ high).T.detach()
    x = images(3)
    expected = stock(state).encode_image(normalised(x))
    assert not torch.allclose(expected, stock().encode_image(normalised(x)), atol=0.1)
    torch.testing.assert_close(a.encode(x), expected, atol=1e-4, rtol=1e-4)

    merged = stock(a.merge())
    tokens = open_clip.get_tokenizer(f"local-dir:{clip.MINI}", bpe_path=str(clip.MINI / "bytes.txt.gz"))(
        [f"a photo of a {name}." for name in ("dog", "electric guitar", "house")]
    )
    text = F.normalize(merged.encode_text(tokens), dim=-1)
    plain = a.logit_scale * F.normalize(merged.encode_image(normalised(x)), dim=-1) @ text.T
    torch.testing.assert_close(a.predict(x), plain, atol=1e-3, rtol=1e-4)


def test_clip_loras_dropout_is_for_training() -> None:
    a, x = make("CLIPLoRA", prompt="template"), images(3)
    randomize(a)
    a.eval()
    assert torch.equal(a.predict(x), a.predict(x))
    still = a.predict(x)
    a.train()
    assert not torch.equal(a.predict(x), a.predict(x))
    for block in a.tower.blocks:
        for adapter in block.attn.adapters.values():
            assert adapter.dropout == 0.25
            adapter.dropout = 0.0
    torch.testing.assert_close(a.predict(x), still)


@pytest.mark.parametrize("targets", ["", "qq", "qx"])
def test_clip_lora_refuses_targets(targets: str) -> None:
    with pytest.raises(UsageError, match="clip_lora_targets"):
        make("CLIPLoRA", clip_lora_targets=targets)


# All


@pytest.mark.parametrize("name", ["FineTuneCLIP", "FLYP", "CLIPood", "CLIPLoRA", "MIRO"])
def test_starts_as_zero_shot(name: str) -> None:
    prompt = {"prompt": "template"} if name == "MIRO" else {}
    a, zero_shot = make(name, **prompt).eval(), make("ZeroShotCLIP").eval()
    torch.testing.assert_close(a.predict(images(4)), zero_shot.predict(images(4)), atol=1e-4, rtol=1e-4)


VISUAL = 86_192_640


@pytest.mark.parametrize(
    ("name", "hparams", "image", "text"),
    [
        ("CLIPAdapter", {}, 131_072, 0),
        ("VPT", {}, 73_728, 0),
        ("VPT", {"vpt_depth": "shallow"}, 6_144, 0),
        ("LPFT", {"steps": 2}, VISUAL, 3 * 513),
        ("FineTuneCLIP", {}, VISUAL, 0),
        ("FLYP", {}, VISUAL, 38_131_200),
        ("CLIPood", {}, VISUAL, 0),
        ("MIRO", {}, VISUAL + 5 * 768, 3 * 513),
        ("CLIPLoRA", {}, 110_592, 73_728),
        ("CLIPLoRA", {"prompt": "template"}, 110_592, 0),
    ],
)
def test_parameters_on_vit_b16(
    name: str, hparams: dict[str, Any], image: int, text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):  # shapes without numbers
        model = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False, device="meta")
    model.logit_scale = torch.nn.Parameter(torch.zeros(()))
    monkeypatch.setattr(clip, "create_model", lambda source: model)
    monkeypatch.setattr(clip.Clip, "encode_prompts", lambda self, prompts: torch.zeros(len(prompts), 512))
    a = make(name, clip_model="ViT-B-16-quickgelu", clip_pretrained="random", **hparams)
    of_text = sum(p.numel() for p in a.text.parameters() if p.requires_grad)
    total = sum(p.numel() for p in a.parameters() if p.requires_grad)
    assert (total - of_text, of_text) == (image, text)


@pytest.mark.parametrize("name", ["FLYP", "CLIPood", "MIRO"])
@pytest.mark.parametrize("released", [False, True])
def test_text_features_of_domains(name: str, released: bool) -> None:
    a = make(name, prompt="dpl", dpl_released_labels=released)
    assert all(math.isfinite(value) for value in a.update(batches((4, 3, 5))).values())
    assert a.eval().predict(images(5)).shape == (5, 3)


def test_fine_tuning_with_from_text_and_wise_is_wise_ft() -> None:
    """One step of AdamW on a classifier that holds T, against ours."""
    a = make("FineTuneCLIP", prompt="from_text", average="wise", lr=3e-5, prompt_lr=3e-5 / 100, weight_decay=0.0)
    a.logit_scale = a.text.logit_scale = 100.0
    tower, (x, y) = copy.deepcopy(a.tower), joined(batches())
    classifier = torch.nn.Parameter(100 * a.text.weight.detach())
    optimizer = torch.optim.AdamW([*unfreeze(tower.parameters()), classifier], lr=3e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(F.normalize(tower(x), dim=-1) @ classifier.T, y).backward()
        optimizer.step()
        a.update(batches())
    torch.testing.assert_close(100 * a.text.weight, classifier, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.encode(x), tower(x), atol=1e-3, rtol=1e-3)
