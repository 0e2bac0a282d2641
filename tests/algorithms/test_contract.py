"""What every registered algorithm promises, under its own text side and under others, on the embedded CLIP."""

import contextlib
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from helpers import batches, images, make
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.registry import ALGORITHMS, PROMPTS, UsageError
from domainbed_hp.training.evaluation import evaluation_mode

IMAGE_SIDES = [name for name in ALGORITHMS if name != "ERM"]
STARTS_AS_ZERO_SHOT = {"ZeroShotCLIP", "FrozenCLIP", "FineTuneCLIP", "FLYP", "CLIPood", "MIRO", "CLIPLoRA", "LoRA"}
STARTS_AS_ZERO_SHOT |= {"HeadPurification", "LPFT"}
ZERO_SHOT_TEXT = {"template", "from_text", "text_tower", "text_lora"}
SMALL = {  # enough to see each text side at work
    "promptstyler": {"styler_styles": 2, "styler_steps": 3, "styler_epochs": 2},
    "duprg": {"duprg_epochs": 3},
    "ensemble": {"ensemble": "imagenet7"},
}
COVERING = [  # every image side and every text side, besides each algorithm's own
    ("ZeroShotCLIP", "promptstyler"),
    ("FrozenCLIP", "cocoop"),
    ("FineTuneCLIP", "dpl"),
    ("LPFT", "from_text"),
    ("FLYP", "cocoop"),
    ("LoRA", "coop"),
    ("CLIPLoRA", "maple"),
    ("CLIPAdapter", "text_lora"),
    ("VPT", "ensemble"),
    ("CLIPood", "dpl"),
    ("MIRO", "text_tower"),
    ("HeadPurification", "duprg"),
    ("HeadPurification", "maple"),
    ("HeadPurification", "random"),
]
Case = tuple[str, dict[str, Any]]


def case(name: str, prompt: str) -> Case:
    return name, {"prompt": prompt, **SMALL.get(prompt, {})}


def refusal(each: Case) -> str:
    try:
        resolve_hparams(each[0], "PACS", 0, 0, MINI | each[1])
    except UsageError as error:
        return str(error)
    return ""


def prompt_of(each: Case) -> str:
    prompt: str = each[1].get("prompt") or resolve_hparams(each[0], "PACS", 0, 0, MINI)["prompt"]
    return prompt


MINI = {"clip_model": "mini", "clip_pretrained": "shapes"}
OWN: list[Case] = [(name, {}) for name in ALGORITHMS]
PAIRS = [case(*pair) for pair in product(IMAGE_SIDES, PROMPTS)]
REFUSED = {each: why for each in product(IMAGE_SIDES, PROMPTS) if (why := refusal(case(*each)))}
EVERY = OWN + [each for each in PAIRS if (each[0], prompt_of(each)) not in REFUSED]


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """By default each algorithm with its own text side, and the covering pairs; all others are slow."""
    default = OWN + [case(*pair) for pair in COVERING]
    marks = [() if each in default else (pytest.mark.slow,) for each in cases]
    names = ["-".join([each[0], *filter(None, [each[1].get("prompt")])]) for each in cases]
    params = [pytest.param(each, id=n, marks=m) for each, n, m in zip(cases, names, marks, strict=True)]
    return pytest.mark.parametrize("each", params)


each_case = parametrized(EVERY)


def build(each: Case, **kwargs: Any) -> Algorithm:
    name, overrides = each
    return make(name, **({"steps": 2} if name == "LPFT" else {}) | overrides | kwargs)


def test_the_covering_pairs_cover_all_and_exist() -> None:
    assert {name for name, _ in COVERING} == set(IMAGE_SIDES)
    assert {prompt_of(each) for each in EVERY if each[0] != "ERM"} == set(PROMPTS)
    assert {prompt for _, prompt in COVERING} | {prompt_of(each) for each in OWN if each[0] != "ERM"} == set(PROMPTS)
    assert not set(COVERING) & set(REFUSED)


def test_refused_pairs() -> None:
    assert all(prompt in why for (_, prompt), why in REFUSED.items())
    trains = set(PROMPTS) - {"template", "ensemble", "duprg", "promptstyler"}
    expected = {("ZeroShotCLIP", prompt) for prompt in trains}  # they need training images
    expected |= {(name, prompt) for name in ("FrozenCLIP", "LPFT") for prompt in set(PROMPTS) - trains}
    expected |= {("FLYP", "random"), ("CLIPood", "random"), ("VPT", "maple")}
    assert set(REFUSED) == expected


FEW = (2, 2, 2)
"""Images of each domain."""


def snapshot(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in algorithm.state_dict().items()}


def trained(each: Case) -> Algorithm:
    algorithm = build(each)
    for step in range(2):
        with evaluation_mode(algorithm):  # between steps, as at records: training goes on
            algorithm.predict(images(1))
        torch.manual_seed(step)
        algorithm.update(batches(FEW, seed=step))
    return algorithm


@each_case
def test_update_is_finite_and_predict_has_the_shape(each: Case) -> None:
    algorithm = build(each)
    logged = algorithm.update(batches((2, 1, 3)))
    assert logged and all(v.dim() == 0 and not v.requires_grad and math.isfinite(v) for v in logged.values())
    logits = algorithm.predict(images(5))
    assert logits.shape == (5, 3) and logits.isfinite().all()
    assert algorithm.eval().predict(images(5)).shape == (5, 3)


@each_case
def test_trained_alike_saved_and_scored_in_any_order(each: Case) -> None:
    """One training serves three promises: same seed, same numbers; a state round trip; no prediction needs others."""
    algorithm, again = trained(each), trained(each)
    a, b = snapshot(algorithm), snapshot(again)
    assert all(torch.equal(a[key], b[key]) for key in a)

    algorithm.eval()
    x = images(6)
    with torch.no_grad():
        together = algorithm.predict(x)
        for state, strict in ((algorithm.state_dict(), True), (algorithm.trained_state(), False)):
            other = build(each, seed=9).eval()
            other.predict(x[:1])  # what it keeps must not outlive its weights
            other.load_state_dict(state, strict=strict)  # what training changed is enough
            assert torch.equal(other.predict(x), together)

    assert not algorithm.describe_protocol(algorithm.hparams).get("transductive")
    scale = getattr(algorithm, "logit_scale", 1.0)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([algorithm.predict(image[None]) for image in x])
        shuffled = torch.empty_like(together)
        shuffled[order] = algorithm.predict(x[order])
    top = together.topk(2).values
    clear = (top[:, 0] - top[:, 1]) / scale > 1e-5
    for other_order in (alone, shuffled):
        torch.testing.assert_close(other_order / scale, together / scale, atol=1e-5, rtol=0)
        assert torch.equal(other_order.argmax(1)[clear], together.argmax(1)[clear])


class Waiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: to ask for a value, or for how many are true."""

    on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        waits = func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        masks = func == aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not (self.on and (waits or masks)), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Optimizers aside: those that count their steps do it on the host."""
    with Waiting() as mode:
        hooks = [
            register_optimizer_step_pre_hook(lambda *_: setattr(mode, "on", False)),
            register_optimizer_step_post_hook(lambda *_: setattr(mode, "on", True)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_case
def test_no_step_waits_for_the_gpu(each: Case) -> None:
    algorithm = build(each).to("cuda")
    minibatches = [(x.cuda(), y.cuda()) for x, y in batches(FEW)]
    algorithm.update(minibatches)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        algorithm.update(minibatches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case
def test_only_what_is_declared_moves_and_all_of_it(each: Case) -> None:
    algorithm = build(each)
    declared = {n for n, p in algorithm.named_parameters() if p.requires_grad}
    before = snapshot(algorithm)
    for step in range(2):
        with never_waiting() if step else contextlib.nullcontext():  # what is made once may wait
            algorithm.update(batches(FEW, seed=step))
    after = snapshot(algorithm)
    moved = {n for n, _ in algorithm.named_parameters() if not torch.equal(before[n], after[n])}
    assert moved == declared
    assert bool(declared) == (each[0] != "ZeroShotCLIP")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_says_under_what_terms_it_stands(name: str) -> None:
    algorithm = build((name, {}))
    terms = algorithm.describe_protocol(algorithm.hparams)
    assert terms.keys() >= {"weights", "template", "transductive", "source_free"}
    assert terms["weights"] == "mini, shapes" and terms["transductive"] is False
    assert terms["source_free"] == (name == "ZeroShotCLIP")


def test_dpl_as_released_depends_on_the_batch_and_says_so() -> None:
    algorithm = trained(("FrozenCLIP", {"prompt": "dpl", "dpl_transductive": True})).eval()
    assert algorithm.describe_protocol(algorithm.hparams)["transductive"]
    x = images(8)
    with torch.no_grad():
        assert not torch.allclose(algorithm.predict(x)[:4], algorithm.predict(x[:4]), atol=1e-4)


@parametrized([each for each in EVERY if each[0] in STARTS_AS_ZERO_SHOT and prompt_of(each) in ZERO_SHOT_TEXT])
def test_starts_as_the_zero_shot_model(each: Case) -> None:
    a, b, x = build(each), make("ZeroShotCLIP"), images(4)
    torch.testing.assert_close(a.eval().predict(x) / a.logit_scale, b.predict(x) / b.logit_scale, atol=1e-6, rtol=0)


@each_case
def test_input_as_in_a_stock_domainbed_checkout(each: Case) -> None:
    x = images(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean[:, None, None]) / std[:, None, None]
    plain, stock = build(each), build(each, input_norm="imagenet")
    torch.testing.assert_close(stock.eval().predict(normalised), plain.eval().predict(x), atol=1e-3, rtol=1e-4)
    if each in OWN:  # DomainBed's loop takes the mean of what is logged by NumPy, which tensors on a GPU refuse
        assert all(isinstance(v, float) for v in stock.train().update(batches(FEW)).values())


@parametrized([each for each in EVERY if each[0] != "ERM"])
def test_class_names_come_as_keyword_or_hparam(each: Case) -> None:
    algorithm = build(each)
    hparams = dict(algorithm.hparams)
    names = hparams.pop("class_names")
    torch.manual_seed(0)
    again = type(algorithm)((3, 64, 64), 3, 3, hparams, class_names=names)
    x = images(2)
    assert torch.equal(again.eval().predict(x), algorithm.eval().predict(x))
    with pytest.raises(ValueError, match="expected 3"):
        type(algorithm)((3, 64, 64), 3, 3, hparams)
