"""Text sides that are trained on text alone, PromptStyler and DUPRG, on the embedded CLIP."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, batches, images, make
from torch import Tensor

from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.networks.clip import load_clip
from domainbed_hp.prompts.duprg import AutoEncoder
from domainbed_hp.prompts.prompt_styler import compute_arcface_logits, compute_content_loss, compute_style_loss
from domainbed_hp.prompts.text_only import TextOnly
from domainbed_hp.registry import UsageError

SMALL: dict[str, dict[str, Any]] = {
    "duprg": {"duprg_epochs": 3},
    "promptstyler": {"styler_styles": 2, "styler_steps": 2, "styler_epochs": 2},
}
BOTH = pytest.mark.parametrize("prompt", SMALL)
NAMES = ["dog", "electric guitar", "house"]


def small(prompt: str, algorithm: str = "ZeroShotCLIP", seed: int = 0, **hparams: Any) -> Any:
    return make(algorithm, seed=seed, prompt=prompt, **(SMALL[prompt] | hparams))


def features(algorithm: Any) -> Tensor:
    """The class features, fitted if need be."""
    result: Tensor = algorithm.text.encode(torch.zeros(1, algorithm.tower.embed_dim), None)
    return result


def no_fit(self: TextOnly) -> Tensor:
    raise AssertionError("fitted again")


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Both


@BOTH
def test_class_features_have_length_1_and_are_the_same_for_any_image(prompt: str) -> None:
    a, b = small(prompt), small(prompt)
    a.predict(images(3, seed=1)), b.predict(images(5, seed=2) * 0)
    assert a.text.features.shape == (3, a.tower.embed_dim)
    torch.testing.assert_close(a.text.features.norm(dim=1), torch.ones(3))
    assert torch.equal(a.text.features, b.text.features)
    cosines = F.normalize(a.encode(images(3)), dim=1) @ a.text.features.T
    torch.testing.assert_close(a.predict(images(3)), a.logit_scale * cosines)


@BOTH
def test_fitted_once_and_not_when_loaded(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, other, third = small(prompt), small(prompt, seed=5), small(prompt, seed=6)
    x = images(3)
    before = algorithm.predict(x)
    monkeypatch.setattr(type(algorithm.text), "fit", no_fit)
    assert torch.equal(algorithm.predict(x), before)
    other.load_state_dict(algorithm.state_dict())
    third.load_state_dict(algorithm.trained_state(), strict=False)  # what a file of weights holds
    assert torch.equal(other.predict(x), before) and torch.equal(third.predict(x), before)
    assert not other.text.helpers  # the text tower is gone


@BOTH
def test_a_state_that_is_not_fitted_yet_is_the_same_run(prompt: str) -> None:
    algorithm, other = small(prompt), small(prompt, seed=5)
    other.load_state_dict(algorithm.state_dict())
    assert torch.equal(features(other), features(algorithm))


@BOTH
def test_seeds(prompt: str) -> None:
    a, again, other = (features(small(prompt, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.allclose(a, other, atol=1e-4)


@BOTH
def test_fit_leaves_the_global_generator_alone_and_does_not_depend_on_it(prompt: str) -> None:
    a, b = small(prompt), small(prompt)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    features(a)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(features(b), features(a))


@BOTH
def test_fit_without_gradients_and_in_low_precision_outside(prompt: str) -> None:
    plain, other = small(prompt), small(prompt)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert other.predict(images(2)).isfinite().all()
    assert torch.equal(other.text.features, features(plain))


@BOTH
def test_double_precision(prompt: str) -> None:
    algorithm = small(prompt).double()
    assert algorithm.predict(images(2).double()).dtype == torch.float64
    torch.testing.assert_close(algorithm.text.features, features(small(prompt)).double(), atol=1e-3, rtol=0)


@BOTH
def test_an_image_side_trains_under_a_frozen_classifier(prompt: str) -> None:
    algorithm = small(prompt, "LoRA")
    assert not list(algorithm.text.parameters())
    assert {name for name, _ in algorithm.text.state_dict().items()} == {"seed", "fitted", "features"}
    algorithm.update(batches())
    fitted, logits = features(algorithm).clone(), algorithm.predict(images(3))
    algorithm.update(batches(seed=1))
    assert torch.equal(features(algorithm), fitted) and fitted.any()
    assert not torch.equal(algorithm.predict(images(3)), logits)


@BOTH
def test_records_say_source_free(prompt: str) -> None:
    algorithm = small(prompt)
    assert algorithm.describe_protocol(algorithm.hparams)["source_free"]
    trained = small(prompt, "LoRA")
    assert not trained.describe_protocol(trained.hparams)["source_free"]
    with pytest.raises(UsageError, match="use ZeroShotCLIP"):
        small(prompt, "FrozenCLIP")


# PromptStyler


def test_style_loss() -> None:
    style, *earlier = units(4, 6)
    cosines = [abs(sum(a * b for a, b in zip(style.tolist(), e.tolist(), strict=True))) for e in earlier]
    assert compute_style_loss(style, earlier).item() == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert compute_style_loss(style, []).item() == 0


def test_content_loss() -> None:
    styled, content = units(3, 6), units(3, 6, seed=1)
    z = [[math.exp(sum(a * b for a, b in zip(s, c, strict=True))) for c in content.tolist()] for s in styled.tolist()]
    expected = -sum(math.log(z[m][m] / sum(z[m])) for m in range(3)) / 3
    assert compute_content_loss(styled, content).item() == pytest.approx(expected, abs=1e-6)


def test_arcface_adds_the_margin_to_the_angle_of_the_true_class() -> None:
    cosines, y = (units(4, 6) @ units(3, 6, seed=1).T), torch.tensor([2, 0, 1, 1])
    angles = torch.acos(cosines)
    angles[range(4), y] += 0.3
    torch.testing.assert_close(compute_arcface_logits(cosines, y, 5.0, 0.3), 5 * torch.cos(angles))
    edge = torch.tensor([[1.0, -1.0]], requires_grad=True)
    compute_arcface_logits(edge, torch.tensor([0]), 5.0, 0.5).sum().backward()
    assert edge.grad is not None and edge.grad.isfinite().all()


def test_style_features_are_clips_own() -> None:
    """With the embeddings of a real word in the gap, the sentence is plain text."""
    clip = load_clip("mini", "shapes")
    expected = clip.encode_prompts(["a a style of a", *(f"a a style of a {name}" for name in NAMES), *NAMES])
    tower, styled, contents = small("promptstyler").text.helpers
    word = tower.embed("a")  # one token
    got = tower(styled(word[None]), styled.ends)
    names = tower(contents(word.new_empty(1, 0, tower.width)), contents.ends)
    torch.testing.assert_close(F.normalize(torch.cat([got, names]).detach(), dim=1), expected, atol=1e-5, rtol=1e-5)


def test_styles_one_after_another_by_both_losses() -> None:
    """Two styles, one step of SGD each, written out."""
    text = small("promptstyler", styler_steps=1, styler_lr=0.5).text
    tower, styled, contents = text.helpers
    torch.manual_seed(7)
    got = text.learn_styles()
    torch.manual_seed(7)
    words = [torch.randn(1, 1, tower.width) * 0.02 for _ in range(2)]
    content = F.normalize(tower(contents(torch.empty(1, 0, tower.width)), contents.ends), dim=1)
    expected: list[Tensor] = []
    for word in words:
        word.requires_grad_()
        z = F.normalize(tower(styled(word), styled.ends), dim=1)
        loss = -((z[1:] @ content.T).log_softmax(1).diagonal()).mean()
        if expected:
            loss = loss + (z[0] @ expected[0][0]).abs()
        stepped = word - 0.5 * torch.autograd.grad(loss, word)[0]
        expected.append(F.normalize(tower(styled(stepped), styled.ends), dim=1).detach())
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert not got.requires_grad


def test_styles_move_apart() -> None:
    def similarity(steps: int) -> float:
        text = small("promptstyler", styler_styles=4, styler_steps=steps, styler_lr=0.02).text
        torch.manual_seed(0)
        styles = text.learn_styles()[:, 0]
        return float((styles @ styles.T).triu(1).abs().sum() / 6)

    assert similarity(15) < 0.7 * similarity(0)


def test_classifier_takes_one_step_as_written_out() -> None:
    text = small("promptstyler", styler_epochs=1, styler_classifier_lr=0.7).text
    x = units(2, 3, 16)
    torch.manual_seed(7)
    got = text.train_classifier(x)
    torch.manual_seed(7)
    weight = torch.nn.Linear(16, 3, bias=False).weight
    angles = torch.acos(x.reshape(6, 16) @ F.normalize(weight, dim=1).T)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = F.cross_entropy(5 * torch.cos(angles + 0.5 * F.one_hot(y)), y)
    torch.testing.assert_close(got, weight - 0.7 * torch.autograd.grad(loss, weight)[0], atol=1e-5, rtol=1e-5)


def test_classifier_finds_the_classes_in_batches_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def counted(cosines: Tensor, *rest: Any) -> Tensor:
        steps.append(len(cosines))
        return compute_arcface_logits(cosines, *rest)

    monkeypatch.setattr("domainbed_hp.prompts.prompt_styler.compute_arcface_logits", counted)
    centres = torch.eye(16)[:3]
    x = F.normalize(centres + 0.1 * units(50, 3, 16), dim=-1)
    weight = small("promptstyler", styler_epochs=20).text.train_classifier(x)
    assert steps == [128, 22] * 20
    assert (F.normalize(weight, dim=1) @ centres.T).argmax(1).tolist() == [0, 1, 2]


# DUPRG


def test_bank_of_prompts() -> None:
    domains = ["photo", "art", "cartoon", "sketch", "clipart", "infograph", "painting", "quickdraw", "real", "product"]
    prompts = [f"a {domain} photo of a electric guitar" for domain in domains]
    expected = load_clip("mini", "shapes").encode_prompts(["a photo of a electric guitar", *prompts])
    bank = small("duprg").text.bank
    assert bank.shape[:2] == (3, 11)
    torch.testing.assert_close(bank[CLASSES.index("electric_guitar")], expected, atol=1e-5, rtol=1e-5)


def test_parameters_of_the_auto_encoder() -> None:
    assert sum(p.numel() for p in AutoEncoder(512).parameters()) == 1_313_536
    assert sum(p.numel() for p in AutoEncoder(768).parameters()) == 1025 * 768 + 788_736
    assert [m.out_features for m in AutoEncoder(48) if isinstance(m, torch.nn.Linear)] == [512, 512, 256, 512, 512, 48]
    assert AutoEncoder(48)(units(2, 48)).norm(dim=1).tolist() == pytest.approx([1, 1])


def loss_of(inputs: Tensor, outputs: Tensor) -> Tensor:
    """DUPRG's loss with its default weights, term by term."""
    classes, domains, _ = inputs.shape
    pairs = [(c, d) for c in range(classes) for d in range(domains)]
    rec = torch.stack([inputs[c, d] @ outputs[c, d] for c, d in pairs]).sum() / len(pairs)
    means = [sum(outputs[c, d] for d in range(domains)) / domains for c in range(classes)]
    intra = torch.stack([outputs[c, d] @ means[c] for c, d in pairs]).sum() / len(pairs)
    others = [outputs[c, d] @ outputs[k, d] for c, d in pairs for k in range(classes) if k != c]
    return -rec - 0.5 * intra + 0.05 * torch.stack(others).sum() / len(others)


def test_loss_of_duprg_and_its_gradient() -> None:
    text = small("duprg").text
    outputs = units(3, 11, text.bank.shape[-1]).requires_grad_()
    got, expected = text.compute_loss(outputs), loss_of(text.bank, outputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, outputs), torch.autograd.grad(expected, outputs))


def test_features_of_duprg_are_mean_outputs_of_an_auto_encoder_trained_by_adamw() -> None:
    algorithm = small("duprg", duprg_epochs=2, duprg_lr=1e-3)
    got, bank = features(algorithm), algorithm.text.bank
    torch.manual_seed(int(algorithm.text.seed))
    model = AutoEncoder(bank.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(bank, model(bank)).backward()
        optimizer.step()
    torch.testing.assert_close(got, F.normalize(model(bank).mean(1), dim=1).detach(), atol=1e-4, rtol=1e-3)


def test_duprg_trains_towards_its_class() -> None:
    algorithm = small("duprg", duprg_epochs=100, duprg_lr=1e-3)
    zero_shot = F.normalize(algorithm.text.bank.mean(1), dim=1)
    assert (features(algorithm) @ zero_shot.T).argmax(1).tolist() == [0, 1, 2]


def test_an_epoch_with_each_step() -> None:
    algorithm = small("duprg", "FrozenCLIP", duprg_per_step=True)
    text = algorithm.text
    before = features(algorithm)
    parameters = list(text.autoencoder.parameters())
    start = [p.detach().clone() for p in parameters]
    loss = loss_of(text.bank, text.autoencoder(text.bank))
    expected = torch.autograd.grad(loss, parameters)
    logged = algorithm.update(batches())
    assert logged.keys() == {"ce", "duprg"} and logged["duprg"] == pytest.approx(loss.item(), abs=1e-5)
    for p, was, gradient in zip(parameters, start, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)  # cross-entropy has no part in it
        step = (was * (1 - 0.04 * 1e-4) - p.detach())[gradient.abs() > 1e-5]
        torch.testing.assert_close(step.abs(), torch.full_like(step, 0.04), atol=1e-4, rtol=0)  # AdamW's first
    assert not torch.equal(features(algorithm), before) and not text.fitted
    torch.testing.assert_close(features(algorithm).norm(dim=1), torch.ones(3))


def test_what_an_epoch_with_each_step_goes_with() -> None:
    algorithm = small("duprg", "FrozenCLIP", duprg_per_step=True)
    algorithm.update(batches())
    other = small("duprg", "FrozenCLIP", seed=5, duprg_per_step=True)
    other.load_state_dict(algorithm.trained_state(), strict=False)
    assert torch.equal(other.predict(images(3)), algorithm.predict(images(3)))
    assert algorithm.describe_protocol(algorithm.hparams)["source_free"]
    plain, loss = features(algorithm), algorithm.text.backward()["duprg"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(algorithm.text.compute_class_features(torch.zeros(1, 1)), plain)
        assert torch.equal(algorithm.text.backward()["duprg"], loss)
    with pytest.raises(UsageError, match="FrozenCLIP"):
        resolve_hparams("ZeroShotCLIP", "PACS", 0, 0, {"prompt": "duprg", "duprg_per_step": True})
    lora = small("duprg", "LoRA", duprg_per_step=True)
    assert {"ce", "duprg"} <= lora.update(batches()).keys()
