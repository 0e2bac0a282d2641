"""Every fast way to train does what the plain one does."""

import copy
import shutil
from typing import Any

import pytest
import torch
from helpers import batches, images, make

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.head_purification import HeadPurification
from domainbed_hp.algorithms.lpft import LPFT
from domainbed_hp.networks.fused import make_fused_adamw
from domainbed_hp.registry import UsageError
from domainbed_hp.training import cuda_graph
from domainbed_hp.training.cuda_graph import COMPILE_STEPS, CudaGraphStep, can_compile, speed_up_training
from domainbed_hp.training.evaluation import evaluation_mode
from domainbed_hp.training.sharpness import SAM
from domainbed_hp.training.weight_averaging import swap_weights

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
IMAGE_SIDES = ["ERM", "FineTuneCLIP", "LoRA", "CLIPLoRA", "VPT", "MIRO", "FLYP", "CLIPood", "CLIPAdapter", "LPFT"]
TEXT_SIDES = ["ensemble", "coop", "cocoop", "dpl", "maple", "promptstyler", "text_tower", "text_lora", "from_text"]
PURIFICATIONS: list[dict[str, Any]] = [
    {},
    {"mmd_reach": "global"},
    {"mmd_level": "output"},
    {"mmd_route": "both", "lora_targets": "qkvo"},
    {"gates": "hard"},
    {"strategy": "alternate"},
    {"accumulate": 2},
]
CASES = [("HeadPurification", hparams) for hparams in PURIFICATIONS]
CASES += [(name, {}) for name in IMAGE_SIDES]
CASES += [("FrozenCLIP", {"prompt": prompt}) for prompt in TEXT_SIDES if prompt not in ("ensemble", "promptstyler")]
CASES += [("HeadPurification", {"prompt": prompt}) for prompt in TEXT_SIDES]


def losses(device: torch.device, choice: str, steps: int, name: str, bf16: bool = False, **hparams: Any) -> list[float]:
    """Return the sum of the logged numbers of each of `steps` updates."""
    torch.manual_seed(0)
    algorithm: Algorithm = make(name, steps=steps, **hparams).to(device)
    speed_up_training(algorithm, device, choice, steps)
    sums = []
    for step in range(steps):
        torch.manual_seed(step)
        minibatches = [(x.to(device), y.to(device)) for x, y in batches(seed=step)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            sums.append(sum(float(value) for value in algorithm.update(minibatches).values()))
    return sums


@needs_compiler
@pytest.mark.slow
def test_compiled_steps_on_the_cpu() -> None:
    plain, fast = (losses(CPU, choice, 50, "HeadPurification", mmd_reach="global") for choice in ("off", "on"))
    assert fast[:5] == pytest.approx(plain[:5], rel=1e-5)
    assert fast == pytest.approx(plain, rel=1e-3)
    assert fast != plain  # it was compiled


def test_on_the_cpu_nothing_is_compiled_unless_asked_for() -> None:
    algorithm = make("HeadPurification")
    speed_up_training(algorithm, CPU, "auto", COMPILE_STEPS)
    assert "forward" not in vars(algorithm.tower.blocks[0]) and "compute_gradients" not in vars(algorithm)


@pytest.mark.slow
def test_a_copy_of_what_is_compiled_computes_with_its_own_weights() -> None:
    original = make("LoRA").eval()  # in evaluation nothing is compiled
    original.compile_parts()
    copied = copy.deepcopy(original)
    for parameter in copied.tower.blocks.parameters():
        torch.nn.init.zeros_(parameter)
    x = images(2)
    assert not torch.equal(copied.predict(x), original.predict(x))


def test_a_gpu_compiles_only_where_triton_can_build(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(cuda_graph, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda_graph.shutil, "which", lambda name: name == "gcc")
    monkeypatch.setattr(cuda_graph.Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.delenv("CC", raising=False)
    assert can_compile(gpu)
    monkeypatch.setenv("CC", "broken")
    assert not can_compile(gpu)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(cuda_graph.Path, "exists", lambda path: False)
    assert not can_compile(gpu)
    with pytest.raises(UsageError, match="Python's headers"):
        speed_up_training(make("LoRA"), gpu, "on", 1)


def test_a_subclass_says_for_itself_that_its_steps_can_be_captured() -> None:
    class MyMethod(HeadPurification):
        pass

    assert make("HeadPurification").can_capture()
    assert not make("HeadPurification", strategy="alternate").can_capture()
    assert not make("HeadPurification", prompt="dpl").can_capture()  # sends sizes to the device at each step
    assert not make("LPFT", prompt="random", steps=4).can_capture()
    assert "CAPTURABLE" not in vars(MyMethod) and "CAPTURABLE" not in vars(LPFT)


@needs_gpu
@pytest.mark.parametrize(("name", "hparams"), CASES, ids=str)
def test_captured_steps(name: str, hparams: dict[str, Any]) -> None:
    device = torch.device("cuda")
    prompt = {"prompt": "random"} if name == "LPFT" else {}
    plain, fast = (losses(device, choice, 6, name, **prompt, **hparams) for choice in ("off", "auto"))
    assert fast == pytest.approx(plain, rel=1e-4)


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("choice", ["auto", "on"])
@pytest.mark.parametrize("hparams", [{}, {"mmd_reach": "global"}])
def test_fifty_steps_on_a_gpu(hparams: dict[str, Any], choice: str, bf16: bool) -> None:
    device = torch.device("cuda")
    plain, fast = (losses(device, c, 50, "HeadPurification", bf16, **hparams) for c in ("off", choice))
    assert fast == pytest.approx(plain, rel=2e-2 if bf16 else 1e-3)


@needs_gpu
def test_a_new_shape_is_captured_anew() -> None:
    device = torch.device("cuda")
    algorithm = make("LoRA").to(device)
    speed_up_training(algorithm, device, "auto", 1)
    assert isinstance(algorithm.compute_gradients, CudaGraphStep)
    for sizes in ((4, 4, 4), (4, 4, 4), (3, 4, 2)):
        algorithm.update([(x.to(device), y.to(device)) for x, y in batches(sizes)])
        assert algorithm.compute_gradients.shapes == [(torch.Size((n, 3, 64, 64)), torch.Size((n,))) for n in sizes]


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)], ids=str)
def test_what_happens_between_steps_is_seen_by_the_next(device: torch.device) -> None:
    """Scoring, weights on loan, climbs, and going on elsewhere."""
    sums = {}
    for choice in ("off", "auto"):
        here, there = (make("HeadPurification", seed, sharpness="sam", lr=0.01).to(device) for seed in (0, 1))
        for algorithm in (here, there):
            speed_up_training(algorithm, device, choice, 1)

        def step(algorithm: Algorithm, i: int) -> float:
            minibatches = [(x.to(device), y.to(device)) for x, y in batches((2, 2, 2), seed=i)]
            with SAM(algorithm, algorithm.hparams).perturb(minibatches):
                return sum(float(value) for value in algorithm.update(minibatches).values())

        sums[choice] = [step(here, i) for i in range(2)]
        trains = [p for p in here.parameters() if p.requires_grad]
        with swap_weights(trains, [torch.ones_like(p) for p in trains]), evaluation_mode(here):
            here.predict(images(2).to(device))
        step(there, 0)
        there.load_training_state(copy.deepcopy(here.training_state()))
        sums[choice] += [step(here, i) for i in range(2, 4)]
        assert [step(there, i) for i in range(2, 4)] == pytest.approx(sums[choice][2:], rel=1e-4)
    assert sums["auto"] == pytest.approx(sums["off"], rel=1e-4)


def test_a_fused_step_is_seen_by_what_is_kept_while_weights_stay() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, before = make_fused_adamw([weight], lr=0.1), weight._version
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight._version > before and weight[0] < 1
