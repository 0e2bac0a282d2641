"""Text sides: the text tower, and every prompt that learns on images, against open_clip's own modules."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, batches, images, make, randomize
from torch import Tensor

from domainbed_hp.hparams_registry import default_hparams
from domainbed_hp.networks.clip import MINI, Clip, load_clip
from domainbed_hp.networks.text import Sentences
from domainbed_hp.prompts import per_image
from domainbed_hp.prompts.base import TextSide, make_prompts, make_text_side
from domainbed_hp.registry import UsageError

NAMES = [name.replace("_", " ") for name in CLASSES]


@pytest.fixture(scope="module")
def stock() -> Any:
    return open_clip.create_model(f"local-dir:{MINI}").eval()


@pytest.fixture(scope="module")
def vit() -> Clip:
    return load_clip("ViT-B-16-quickgelu", "random")


def side(clip: Clip, prompt: str, **hparams: Any) -> TextSide:
    choice = {"prompt": prompt}
    return make_text_side(clip, CLASSES, default_hparams("FrozenCLIP", "PACS", choice) | choice | hparams)


def mini(prompt: str, **hparams: Any) -> TextSide:
    return side(load_clip("mini", "shapes"), prompt, **hparams).eval()


def unit_features(n: int, size: int = 128, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def read(stock: Any, embedded: Tensor, ends: Tensor, deep: Any = ()) -> Tensor:
    """open_clip's text tower from embeddings on; `deep` stands in the place of tokens 1, 2, ... from layer 2 on."""
    x = embedded + stock.positional_embedding
    for i, block in enumerate(stock.transformer.resblocks):
        if 0 < i <= len(deep):
            x = x.clone()
            x[:, 1 : 1 + len(deep[i - 1])] = deep[i - 1]
        x = block(x, attn_mask=stock.attn_mask)
    x = stock.ln_final(x)[torch.arange(len(x)), ends] @ stock.text_projection
    return F.normalize(x, dim=-1)


def with_vectors(stock: Any, tokenizer: Any, vectors: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """[SOS] vectors text [EOS], padded to the full length, and where [EOS] is."""
    ids = tokenizer(texts)
    embedded = stock.token_embedding(ids)
    vectors = vectors.expand(len(texts), -1, -1)
    length = embedded.shape[1]
    return torch.cat([embedded[:, :1], vectors, embedded[:, 1:]], 1)[:, :length], ids.argmax(1) + vectors.shape[1]


@pytest.mark.parametrize("which", ["mini", "vit"])
@torch.no_grad()
def test_text_tower_is_open_clips(which: str, vit: Clip) -> None:
    clip = vit if which == "vit" else load_clip("mini", "shapes")
    prompts = ["a photo of a dog.", "a", "a sketch of an electric guitar."]
    tower = clip.make_text_tower()
    expected = clip._model.encode_text(tower.tokenizer(prompts))
    sentences = Sentences(tower, "", 0, prompts)
    cut = sentences(torch.empty(1, 0, tower.width))
    assert cut.shape[1] < tower.context_length
    torch.testing.assert_close(tower(cut, sentences.ends), expected, atol=1e-5, rtol=1e-5)
    whole = tower.token_embedding(tower.tokenizer(prompts))
    torch.testing.assert_close(tower(whole, sentences.ends), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sentences_put_vectors_between_their_two_texts(stock: Any) -> None:
    tower = load_clip("mini", "shapes").make_text_tower()
    sentences = Sentences(tower, "a photo", 2, ["of a dog.", "cat"])
    vectors = torch.randn(5, 2, 2, tower.width)
    embedded = sentences(vectors)
    ids = tower.tokenizer(["a photo of a dog.", "a photo cat"])
    expected, at = stock.token_embedding(ids), len(tower.tokenize("a photo")) + 1
    assert sentences.at == at and torch.equal(sentences.ends, ids.argmax(1) + 2)
    for b in range(5):
        for c in range(2):
            end = int(sentences.ends[c]) + 1
            sentence = torch.cat([expected[c, :at], vectors[b, c], expected[c, at:]])
            assert torch.equal(embedded[b, c, :end], sentence[:end])
    assert tower(embedded, sentences.ends).shape == (5, 2, 128)
    torch.testing.assert_close(tower(embedded, sentences.ends)[3], tower(embedded[3], sentences.ends))


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="fewer prompt_tokens"):
        mini("coop", prompt_tokens=60)


@torch.no_grad()
def test_template_and_ensemble(stock: Any) -> None:
    tokenizer = load_clip("mini", "shapes").make_text_tower().tokenizer
    x = unit_features(4)
    fixed, ensemble = mini("template", template="a {} here."), mini("ensemble", ensemble="imagenet7")
    expected = stock.encode_text(tokenizer([f"a {name} here." for name in NAMES]))
    torch.testing.assert_close(fixed(3 * x), fixed.logit_scale * x @ F.normalize(expected, dim=-1).T)
    seven = [
        F.normalize(stock.encode_text(tokenizer([t(name) for name in NAMES])), dim=-1)
        for t in open_clip.SIMPLE_IMAGENET_TEMPLATES
    ]
    torch.testing.assert_close(ensemble.encode(x, None), F.normalize(torch.stack(seven).mean(0), dim=-1))


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("template", 0),
        ("coop", 16 * 512),
        ("cocoop", 35_360),
        ("dpl", (512 * 512 + 512) + (512 * 512 + 512) + (512 * 16 * 512 + 16 * 512)),
        ("maple", 3_555_072),
        ("text_lora", 73_728),
        ("from_text", 3 * 512),
        ("random", 3 * 513),
    ],
)
def test_trainable_parameters_on_vit_b_16(prompt: str, count: int, vit: Clip) -> None:
    text = side(vit, prompt)
    assert sum(p.numel() for p in text.parameters() if p.requires_grad) == count
    optimizer = text.make_optimizer()
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == count if optimizer else count == 0


def test_defaults_are_the_releases(vit: Clip) -> None:
    def settings(prompt: str) -> tuple[str, float, float, float]:
        optimizer = side(vit, prompt).make_optimizer()
        group = optimizer.param_groups[0]
        return type(optimizer).__name__, group["lr"], group["momentum"], group["weight_decay"]

    assert settings("coop") == settings("cocoop") == ("SGD", 2e-3, 0.9, 5e-4)
    assert settings("maple") == ("SGD", 3.5e-3, 0.9, 5e-4)
    assert settings("dpl") == ("SGD", 1e-3, 0.1, 0.0)


@torch.no_grad()
def test_coop_reads_start_vectors_name_end(stock: Any) -> None:
    text = mini("coop", prompt_tokens=5)
    text.context.normal_()
    expected = read(stock, *with_vectors(stock, text.tower.tokenizer, text.context, [f"{n}." for n in NAMES]))
    torch.testing.assert_close(text.encode(unit_features(2), None), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_are_kept_while_nothing_changes() -> None:
    text = mini("coop")
    cached = text.compute_class_features(unit_features(2))
    assert text.compute_class_features(unit_features(5)) is cached
    text.context.add_(1)
    assert not torch.equal(text.compute_class_features(unit_features(2)), cached)
    assert mini("cocoop").compute_class_features(unit_features(5)).shape == (5, 3, 128)


@torch.no_grad()
def test_cocoop_is_a_loop_over_images(stock: Any) -> None:
    text, x = mini("cocoop"), unit_features(4)
    tokenizer = text.tower.tokenizer
    ids = tokenizer(["a photo of a"])
    assert torch.equal(text.context, stock.token_embedding(ids)[0, 1 : int(ids.argmax())])
    first, _, second = text.meta_net
    assert first.weight.shape == (8, 128) and second.weight.shape == (128, 8)
    second.weight.normal_()
    logits = []
    for image in x:
        shift = second.weight @ (first.weight @ image + first.bias).clamp(min=0) + second.bias
        sentences = with_vectors(stock, tokenizer, text.context + shift, [f"{n}." for n in NAMES])
        logits.append(text.logit_scale * read(stock, *sentences) @ image)
    torch.testing.assert_close(text(7 * x), torch.stack(logits), atol=1e-3, rtol=1e-5)


def test_cocoop_starts_as_the_words_on_vit_b_16(vit: Clip) -> None:
    text = side(vit, "cocoop")
    ids = text.tower.tokenizer(["a photo of a"])[0, 1:5]
    assert torch.equal(text.context.detach(), text.tower.token_embedding(ids).detach())


@pytest.mark.parametrize("prompt", ["cocoop", "dpl"])
def test_encoding_in_parts_gives_the_same_gradients(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, x, read_by_tower = mini(prompt), unit_features(4), []
    text.tower.register_forward_pre_hook(lambda _, args: read_by_tower.append(args[0].flatten(0, -3).shape[0]))

    def gradients() -> list[Tensor]:
        loss = F.cross_entropy(text(x), torch.tensor([0, 1, 2, 0]))
        return list(torch.autograd.grad(loss, [p for p in text.parameters() if p.requires_grad]))

    whole = gradients()
    assert read_by_tower == [12]
    monkeypatch.setattr(per_image, "SEQUENCES", 7)
    read_by_tower.clear()
    for a, b in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert read_by_tower == [6, 6, 6, 6]  # the backward pass encodes each part again
    read_by_tower.clear()
    with torch.no_grad():
        text(x)
    assert read_by_tower == [6, 6]


def mlp(text: TextSide, x: Tensor) -> Tensor:
    """DPL's network on image features of length 10, without dropout."""
    a, b, c = (layer for layer in text.mlp if isinstance(layer, torch.nn.Linear))
    h = (10 * x @ a.weight.T + a.bias).clamp(min=0)
    h = (h @ b.weight.T + b.bias).clamp(min=0)
    return (h @ c.weight.T + c.bias).reshape(len(x), -1, 128)


def dpl_text(stock: Any, text: TextSide, prompt: Tensor) -> Tensor:
    return read(stock, *with_vectors(stock, text.tower.tokenizer, prompt, [f"{n}." for n in NAMES]))


@torch.no_grad()
def test_dpl_gives_each_domain_the_mean_over_its_images(stock: Any) -> None:
    text, x, sizes = mini("dpl"), unit_features(6), [2, 3, 1]
    rows = [dpl_text(stock, text, mlp(text, domain).mean(0)) for domain in x.split(sizes)]
    per_image_text = torch.stack([rows[k] for k, n in enumerate(sizes) for _ in range(n)])
    torch.testing.assert_close(text.compute_class_features(x, sizes), per_image_text, atol=1e-5, rtol=1e-5)
    expected = torch.stack([text.logit_scale * t @ image for t, image in zip(per_image_text, x, strict=True)])
    torch.testing.assert_close(text(x, sizes), expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_dpl_evaluates_each_image_alone_or_the_batch_as_one(stock: Any) -> None:
    text, x = mini("dpl"), unit_features(4)
    alone = torch.stack([dpl_text(stock, text, prompt) for prompt in mlp(text, x)])
    torch.testing.assert_close(text.compute_class_features(x), alone, atol=1e-5, rtol=1e-5)
    text.hparams["dpl_transductive"] = True
    together = dpl_text(stock, text, mlp(text, x).mean(0))
    torch.testing.assert_close(text.compute_class_features(x), together, atol=1e-5, rtol=1e-5)
    assert text.is_transductive(text.hparams) and not text.is_transductive(text.hparams | {"dpl_transductive": False})


def test_dpl_released_labels_are_right_for_the_first_domain_alone(stock: Any) -> None:
    algorithm = make("FrozenCLIP", prompt="dpl", dpl_released_labels=True, dpl_dropout=0.0)
    data, text = batches((4, 2, 3)), algorithm.text
    with torch.no_grad():
        x = [F.normalize(algorithm.encode(images), dim=-1) for images, _ in data]
        rows = torch.cat([dpl_text(stock, text, mlp(text, domain).mean(0)) for domain in x])
        expected = F.cross_entropy(text.logit_scale * torch.cat(x) @ rows.T, torch.cat([y for _, y in data]))
    assert rows.shape == (9, 128)
    assert algorithm.update(data)["ce"] == pytest.approx(float(expected), rel=1e-4)
    assert algorithm.predict(images(2)).shape == (2, 3)


def test_dpl_starts_xavier_with_bias_and_drops_out() -> None:
    text, x = mini("dpl"), unit_features(3)
    for layer in text.mlp:
        if isinstance(layer, torch.nn.Linear):
            assert (layer.bias == 0.01).all()
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert torch.equal(text(x), text(x))
    text.train()
    assert text(x).shape == (3, 3) and not torch.equal(text(x), text(x))  # without sizes, too


@torch.no_grad()
def test_maple_replaces_the_prompts_of_each_layer_in_both_towers(stock: Any) -> None:
    algorithm, x = make("FrozenCLIP", prompt="maple").eval(), images(3)
    text, depth = algorithm.text, 2  # the text tower's layers
    prompts = list(text.text_prompts)
    for prompt in prompts:
        prompt.normal_()
    vision_prompts = [p @ linear.weight.T + linear.bias for p, linear in zip(prompts, text.projections, strict=True)]
    assert len(prompts) == depth and vision_prompts[0].shape == (2, 160)

    visual = stock.visual
    tokens = visual.conv1(algorithm.tower.normalise(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(3, 1, -1), tokens], 1) + visual.positional_embedding
    h = visual.ln_pre(torch.cat([tokens, vision_prompts[0].expand(3, -1, -1)], 1))
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < depth:
            h[:, -2:] = vision_prompts[i]
        h = block(h)
    features = visual.ln_post(h[:, 0]) @ visual.proj
    torch.testing.assert_close(algorithm.encode(x), features, atol=1e-4, rtol=1e-4)

    embedded, ends = with_vectors(stock, text.tower.tokenizer, prompts[0], [f"of a {name}." for name in NAMES])
    expected = read(stock, embedded, ends, prompts[1:])
    torch.testing.assert_close(text.encode(features, None), expected, atol=1e-4, rtol=1e-4)
    logits = text.logit_scale * F.normalize(features, dim=-1) @ expected.T
    torch.testing.assert_close(algorithm.predict(x), logits, atol=1e-2, rtol=1e-4)


@torch.no_grad()
def test_maple_on_vit_b_16(vit: Clip) -> None:
    text, stock = side(vit, "maple"), vit._model
    ids = text.tower.tokenizer([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(text.text_prompts[0], stock.token_embedding(ids)[0, 1:3])
    assert text.text_prompts[8].std() == pytest.approx(0.02, rel=0.2)
    for prompt in text.text_prompts[1:]:
        prompt.normal_()
    expected = read(stock, stock.token_embedding(ids), ids.argmax(1), list(text.text_prompts)[1:])
    torch.testing.assert_close(text.encode(unit_features(1), None), expected, atol=1e-5, rtol=1e-5)

    assert len(text.text_prompts) == len(text.compute_vision_prompts()) == 9
    last = text.text_prompts[8] @ text.projections[8].weight.T + text.projections[8].bias
    torch.testing.assert_close(text.compute_vision_prompts()[8], last)
    assert len(side(vit, "maple", prompt_depth=1, prompt_tokens=6).compute_vision_prompts()) == 1


def test_maple_reaches_into_one_image_tower_and_does_not_own_it() -> None:
    algorithm = make("FrozenCLIP", prompt="maple")
    assert not algorithm.has_frozen_features(algorithm.hparams)
    assert not any("conv1" in name for name in algorithm.text.state_dict())
    with pytest.raises(UsageError, match="already has prompts"):
        algorithm.text.attach(algorithm.tower)


def test_cocoop_without_words_is_refused() -> None:
    with pytest.raises(UsageError, match="prompt_init is empty"):
        make("FrozenCLIP", prompt="cocoop", prompt_init=" ")


def test_text_lora_scales_by_alpha_over_root_r_and_merges(stock: Any) -> None:
    algorithm = make("FrozenCLIP", prompt="text_lora", text_lora_rank=4, text_lora_alpha=3.0).eval()
    text, prompts = algorithm.text, [f"a photo of a {name}." for name in NAMES]
    randomize(algorithm, scale=1.0)
    changed = open_clip.create_model(f"local-dir:{MINI}").eval()
    with torch.no_grad():
        for block, ours in zip(changed.transformer.resblocks, text.tower.blocks, strict=True):
            for target, rows in zip("qkv", block.attn.in_proj_weight.chunk(3), strict=True):
                lora = ours.attn.adapters[target]
                rows += 3 / 4**0.5 * (lora.lora_A[0] @ torch.cat(list(lora.lora_B), 1)).T
        expected = F.normalize(changed.encode_text(text.tower.tokenizer(prompts)), dim=-1)
        zero_shot = F.normalize(stock.encode_text(text.tower.tokenizer(prompts)), dim=-1)
        assert (expected - zero_shot).abs().max() > 1e-2
        torch.testing.assert_close(text.encode(images(1), None), expected, atol=1e-5, rtol=1e-5)
        missing, unexpected = changed.load_state_dict(text.merge(), strict=False)
        assert not unexpected and all(k.startswith("visual.") or k == "logit_scale" for k in missing)
        merged = F.normalize(changed.encode_text(text.tower.tokenizer(prompts)), dim=-1)
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(text.train().encode(images(1), None), text.encode(images(1), None))  # dropout


def test_tuned_text_tower_trains_all_but_token_embeddings() -> None:
    algorithm = make("FrozenCLIP", prompt="text_tower")
    algorithm.update(batches())
    still = {name for name, p in algorithm.text.named_parameters() if not p.requires_grad}
    assert still == {"tower.token_embedding.weight"}
    fresh = make("FrozenCLIP", prompt="text_tower").text.state_dict()
    moved = {name for name, p in algorithm.text.named_parameters() if not torch.equal(p, fresh[name])}
    assert moved == {name for name, p in algorithm.text.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("prompt", "lr"), [("coop", 2e-3), ("cocoop", 2e-3), ("dpl", 1e-3), ("maple", 3.5e-3), ("text_lora", 5e-3)]
)
def test_learning_lowers_the_loss(prompt: str, lr: float) -> None:
    algorithm = make("FrozenCLIP", prompt=prompt, prompt_lr=lr)
    losses = [algorithm.update(batches((4, 4, 4)))["ce"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("targets", ["", "xyz", "qq"])
def test_text_lora_targets_are_checked(targets: str) -> None:
    with pytest.raises(UsageError, match="text_lora_targets.*each at most once"):
        make("LoRA", prompt="text_lora", text_lora_targets=targets)


def test_braces_in_a_template_are_plain_text() -> None:
    assert make_prompts(["sea_horse"], "a {x} of {} }") == ["a {x} of sea horse }"]


def test_a_linear_classifier_answers_in_full_precision() -> None:
    algorithm = make("FrozenCLIP", prompt="random")
    with torch.autocast("cpu", torch.bfloat16):
        assert algorithm.predict(images(2)).dtype == torch.float32


def test_kept_text_features_are_those_of_the_precision_at_hand() -> None:
    algorithm = make("FrozenCLIP", prompt="coop").eval()
    with torch.no_grad():
        expected = algorithm.predict(images(2))
        with torch.autocast("cpu", torch.bfloat16):
            algorithm.predict(images(2))
        assert torch.equal(algorithm.predict(images(2)), expected)
