"""The contract of every registered algorithm, under its own text side and under others."""

import contextlib
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from helpers import batches, images, make
from tiny import TINY
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.hparams_registry import HParam, resolve_hparams
from domainbed_hp.registry import ALGORITHMS, PROMPTS, UsageError
from domainbed_hp.testing import check_algorithm, check_text_side

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


def refusal(pair: Case) -> str:
    try:
        resolve_hparams(pair[0], "PACS", 0, 0, MINI | pair[1])
    except UsageError as error:
        return str(error)
    return ""


def prompt_of(pair: Case) -> str:
    prompt: str = pair[1].get("prompt") or resolve_hparams(pair[0], "PACS", 0, 0, MINI)["prompt"]
    return prompt


MINI = {"clip_model": "mini", "clip_pretrained": "shapes"}
OWN: list[Case] = [(name, {}) for name in ALGORITHMS]
PAIRS = [case(*pair) for pair in product(IMAGE_SIDES, PROMPTS)]
REFUSED = {pair: why for pair in product(IMAGE_SIDES, PROMPTS) if (why := refusal(case(*pair)))}
EVERY = OWN + [pair for pair in PAIRS if (pair[0], prompt_of(pair)) not in REFUSED]


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """By default each algorithm with its own text side, and the covering pairs; all others are slow."""
    default = OWN + [case(*pair) for pair in COVERING]
    marks = [() if pair in default else (pytest.mark.slow,) for pair in cases]
    names = ["-".join([pair[0], *filter(None, [pair[1].get("prompt")])]) for pair in cases]
    params = [pytest.param(pair, id=n, marks=m) for pair, n, m in zip(cases, names, marks, strict=True)]
    return pytest.mark.parametrize("pair", params)


each_case = parametrized(EVERY)


def build(pair: Case, **kwargs: Any) -> Algorithm:
    name, overrides = pair
    return make(name, **({"steps": 2} if name == "LPFT" else {}) | overrides | kwargs)


def test_the_covering_pairs_cover_all_and_exist() -> None:
    assert {name for name, _ in COVERING} == set(IMAGE_SIDES)
    assert {prompt_of(pair) for pair in EVERY if pair[0] != "ERM"} == set(PROMPTS)
    assert {prompt for _, prompt in COVERING} | {prompt_of(pair) for pair in OWN if pair[0] != "ERM"} == set(PROMPTS)
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


@each_case
def test_the_contract(pair: Case) -> None:
    check_algorithm(pair[0], **TINY | ({"backbone": "clip"} if pair[0] == "ERM" else {}) | pair[1])


@pytest.mark.parametrize(
    ("name", "hparams"),
    [("HeadPurification", {"strategy": "alternate"}), ("FrozenCLIP", {"prompt": "dpl", "dpl_transductive": True})],
)
def test_the_contract_under_hparams_that_change_it(name: str, hparams: dict[str, Any]) -> None:
    check_algorithm(name, **TINY | hparams)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_contract_of_a_text_side(prompt: str) -> None:
    check_text_side(prompt, **TINY | SMALL.get(prompt, {}))


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
def test_no_step_waits_for_the_gpu(pair: Case) -> None:
    algorithm = build(pair).to("cuda")
    minibatches = [(x.cuda(), y.cuda()) for x, y in batches(FEW)]
    algorithm.update(minibatches)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        algorithm.update(minibatches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case
def test_no_second_step_asks_for_a_value(pair: Case) -> None:
    algorithm = build(pair)
    for step in range(2):
        with never_waiting() if step else contextlib.nullcontext():  # what is made once may wait
            algorithm.update(batches(FEW, seed=step))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_says_under_what_terms_it_stands(name: str) -> None:
    algorithm = build((name, {}))
    terms = algorithm.describe_protocol(algorithm.hparams)
    assert terms.keys() >= {"weights", "template", "transductive", "source_free"}
    assert terms["weights"] == "mini, shapes" and terms["transductive"] is False
    assert terms["source_free"] == (name == "ZeroShotCLIP")


def test_dpl_as_released_depends_on_the_batch_and_says_so() -> None:
    algorithm = build(("FrozenCLIP", {"prompt": "dpl", "dpl_transductive": True})).eval()
    assert algorithm.describe_protocol(algorithm.hparams)["transductive"]
    x = images(8)
    with torch.no_grad():
        assert not torch.allclose(algorithm.predict(x)[:4], algorithm.predict(x[:4]), atol=1e-4)


@parametrized([pair for pair in EVERY if pair[0] in STARTS_AS_ZERO_SHOT and prompt_of(pair) in ZERO_SHOT_TEXT])
def test_starts_as_the_zero_shot_model(pair: Case) -> None:
    a, b, x = build(pair), make("ZeroShotCLIP"), images(4)
    torch.testing.assert_close(a.eval().predict(x) / a.logit_scale, b.predict(x) / b.logit_scale, atol=1e-6, rtol=0)


@each_case
def test_input_as_in_a_stock_domainbed_checkout(pair: Case) -> None:
    x = images(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean[:, None, None]) / std[:, None, None]
    plain, stock = build(pair), build(pair, input_norm="imagenet")
    torch.testing.assert_close(stock.eval().predict(normalised), plain.eval().predict(x), atol=1e-3, rtol=1e-4)
    if pair in OWN:  # DomainBed's loop takes the mean of what is logged by NumPy, which tensors on a GPU refuse
        assert all(isinstance(v, float) for v in stock.train().update(batches(FEW)).values())


@pytest.mark.parametrize("name", IMAGE_SIDES)
def test_class_names_are_asked_for(name: str) -> None:
    hparams = build((name, {})).hparams | {"class_names": None}
    with pytest.raises(ValueError, match="expected 3"):
        get_algorithm_class(name)((3, 64, 64), 3, 3, hparams)


PASTED = """
class Pasted(Algorithm):
    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super(Pasted, self).__init__(input_shape, num_classes, num_domains, hparams)
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches, unlabeled=None):
        penalty_weight = self.hparams["vrex_lambda"] if self.update_count >= 1 else 1.0
        losses = torch.stack([F.cross_entropy(self.network(x), y) for x, y in minibatches])
        penalty = ((losses - losses.mean()) ** 2).mean()
        loss = losses.mean() + penalty_weight * penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.update_count += 1
        return {"loss": loss.item(), "penalty": penalty.item()}

    def predict(self, x):
        return self.network(x)
"""
"""A method in DomainBed's own style, as its algorithms.py has VREx."""


@pytest.mark.parametrize(
    ("declared", "missing"),
    [((), "lr"), (("lr", "weight_decay"), "vrex_lambda"), (("lr", "weight_decay", "vrex_lambda"), None)],
)
def test_a_method_pasted_from_domainbed_declares_its_hparams(declared: tuple[str, ...], missing: str | None) -> None:
    names: dict[str, Any] = {"Algorithm": Algorithm, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(PASTED, names)
    names["Pasted"].HPARAMS = Algorithm.HPARAMS | {name: HParam(1e-3) for name in declared}
    if missing is None:
        check_algorithm(names["Pasted"])
        return
    declare = re.escape(f"HPARAMS = Algorithm.HPARAMS | {{'{missing}': HParam(")
    with pytest.raises(AssertionError, match=f"Pasted reads hparam '{missing}' and does not declare it.*{declare}"):
        check_algorithm(names["Pasted"])
