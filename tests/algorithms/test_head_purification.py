"""Gradient routing, strategies, and the planted head."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import batches, make, randomize
from safetensors.torch import save_file
from torch import Tensor

import domainbed_hp
from domainbed_hp.algorithms.head_purification import HeadPurification
from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.networks.clip import MINI
from domainbed_hp.networks.mmd import MMD
from domainbed_hp.registry import UsageError

GATES = ("softmax", "sigmoid")
LEVELS = (("output", "global"), ("layers", "global"), ("layers", "local"))


def double(weight: float = 1.0, **hparams: Any) -> HeadPurification:
    """In float64, adapters and gates away from zero, learning rate 0 so that `update` leaves gradients to look at."""
    algorithm = make("HeadPurification", lr=0.0, weight_decay=0.0, mmd_weight=weight, **hparams)
    randomize(algorithm)
    return algorithm.double()


def gradients(algorithm: HeadPurification, minibatches: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the gates and of the adapters after `update`."""
    algorithm.update(minibatches)
    return [p.grad.clone() for p in algorithm.gates], [p.grad.clone() for p in algorithm.adapters]


def mmd_gradients(minibatches: list[Any], **hparams: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the MMD's part of the gradients of a real update."""
    with_mmd, without = (gradients(double(w, **hparams), minibatches) for w in (1.0, 0.0))
    return tuple([a - b for a, b in zip(x, y, strict=True)] for x, y in zip(with_mmd, without, strict=True))


def terms(algorithm: HeadPurification, minibatches: list[Any], scales: Tensor | None) -> tuple[Tensor, Any]:
    """MMD of each layer (or of the output) over the number of layers, bandwidths held at `scales`."""
    trace: list[Any] = []
    x = torch.cat([x for x, _ in minibatches])
    features = algorithm.encode(x, trace)
    sizes = [len(x) for x, _ in minibatches]
    mmd, z = MMD(), algorithm.compute_domain_features(features, trace)
    value, used = mmd(z, sizes, scales)
    if algorithm.hparams["mmd_level"] == "output":
        return value[None], used
    values = [mmd(z[i], sizes, used[i] if scales is None else scales[i])[0] for i in range(len(trace))]
    return torch.stack(values) / len(trace), used


@pytest.mark.parametrize(("gates", "place"), list(product(GATES, LEVELS)))
def test_route_gates_equals_finite_differences(gates: str, place: tuple[str, str]) -> None:
    minibatches = batches((3, 4, 3), dtype=torch.float64)
    hparams = {"gates": gates, "mmd_level": place[0], "mmd_reach": place[1]}
    on_gates, on_adapters = mmd_gradients(minibatches, mmd_route="gates", **hparams)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in on_adapters)

    algorithm = double(**hparams)
    with torch.no_grad():
        _, scales = terms(algorithm, minibatches, None)
        eps = 1e-5
        for layer, head in ((0, 1), (2, 0), (5, 7)):
            logits = algorithm.gates[layer]
            values = []
            for sign in (1, -1):
                logits[head] += sign * eps
                value = terms(algorithm, minibatches, scales)[0]
                values.append(value[layer] if place == ("layers", "local") else value.sum())
                logits[head] -= sign * eps
            expected = (values[0] - values[1]) / (2 * eps)
            assert on_gates[layer][head].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
            assert abs(expected.item()) > 1e-7


@pytest.mark.parametrize("place", LEVELS)
@pytest.mark.parametrize("gates", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_route_adapters_is_the_reverse_and_both_is_the_sum(gates: str, place: tuple[str, str]) -> None:
    minibatches = batches((3, 4, 3), dtype=torch.float64)
    hparams = {"gates": gates, "mmd_level": place[0], "mmd_reach": place[1], "lora_targets": "qkvo"}
    routed = {r: mmd_gradients(minibatches, mmd_route=r, **hparams) for r in ("gates", "adapters", "both")}
    assert all(torch.equal(g, torch.zeros_like(g)) for g in routed["adapters"][0])
    assert any(g.abs().max() > 1e-7 for g in routed["adapters"][1])
    for i in (0, 1):
        for both, gate, adapter in zip(*(routed[r][i] for r in ("both", "gates", "adapters")), strict=True):
            torch.testing.assert_close(both, gate + adapter, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("place", LEVELS)
def test_route_adapters_equals_finite_differences(place: tuple[str, str]) -> None:
    minibatches = batches((3, 4, 3), dtype=torch.float64)
    hparams = {"mmd_level": place[0], "mmd_reach": place[1], "mmd_route": "adapters"}
    _, on_adapters = mmd_gradients(minibatches, **hparams)
    algorithm = double(**hparams)
    names = [n for n, p in algorithm.named_parameters() if any(p is a for a in algorithm.adapters)]
    with torch.no_grad():
        _, scales = terms(algorithm, minibatches, None)
        for i in (0, 1, len(names) - 3):  # lora_A, lora_B of the first layer; one of the last
            layer = int(names[i].split(".")[3])
            flat, values = algorithm.adapters[i].view(-1), []
            for sign in (1, -1):
                flat[5] += sign * 1e-5
                value = terms(algorithm, minibatches, scales)[0]
                values.append(value[layer] if place == ("layers", "local") else value.sum())
                flat[5] -= sign * 1e-5
            expected = ((values[0] - values[1]) / 2e-5).item()
            assert on_adapters[i].view(-1)[5].item() == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("route", ["gates", "adapters", "both"])
def test_local_reach_touches_no_other_layer(route: str) -> None:
    minibatches = batches((3, 4, 3), dtype=torch.float64)
    algorithm = double(mmd_reach="local", mmd_route=route)
    values, _ = terms(algorithm, minibatches, None)
    for layer, value in enumerate(values):
        grads = torch.autograd.grad(value, algorithm.gates, retain_graph=True, allow_unused=True)
        touched = [g is not None and g.abs().max().item() > 0 for g in grads]
        assert touched == [i == layer for i in range(len(values))]


def test_backward_returns_the_two_losses() -> None:
    algorithm = make("HeadPurification")
    losses = algorithm.backward(batches(), 1.0)
    assert losses.keys() == {"ce", "mmd"} and all(v.ndim == 0 for v in losses.values())
    assert algorithm.backward(batches((4,)), 1.0)["mmd"].item() == 0  # one source environment
    logged = algorithm.update(batches())
    assert logged["ce"] == pytest.approx(losses["ce"].item())
    assert logged["mmd"] == pytest.approx(losses["mmd"].item(), rel=1e-4)


def moved(algorithm: HeadPurification, step: Any) -> tuple[bool, bool]:
    """Return (gates moved, adapters moved) for a call of `step`."""
    before = [[p.detach().clone() for p in ps] for ps in (algorithm.gates, algorithm.adapters)]
    step()
    after = (algorithm.gates, algorithm.adapters)
    return tuple(
        any(not torch.equal(p, q) for p, q in zip(x, y, strict=True)) for x, y in zip(before, after, strict=True)
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("joint", [(True, True)] * 4),
        ("alternate", [(False, True), (True, False)] * 2),
        ("two_stage", [(False, True)] * 3 + [(True, False)]),  # 5 steps: the first half ends before step 2.5
    ],
)
def test_strategies(strategy: str, expected: list[tuple[bool, bool]]) -> None:
    algorithm = make("HeadPurification", strategy=strategy, steps=5)
    seen = [moved(algorithm, lambda: algorithm.update(batches())) for _ in range(4)]
    assert seen == expected


@pytest.mark.parametrize(("name", "own"), [("HeadPurification", {"strategy": "alternate"}), ("LPFT", {"steps": 2})])
def test_what_goes_on_knows_its_stage(name: str, own: dict[str, Any]) -> None:
    before, after, whole = (make(name, **own) for _ in range(3))
    before.update(batches())
    after.load_training_state(before.training_state())
    for algorithm in (after, whole):
        for step in range(1 if algorithm is after else 0, 2):
            algorithm.update(batches(seed=step))
    state, expected = after.state_dict(), whole.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_without_gates_or_adapters() -> None:
    for hparams in ({"gates": "none"}, {"lora_rank": 0, "lora_rank_last": 0}, {"lora_targets": ""}):
        algorithm = make("HeadPurification", **hparams)
        x, y = batches()[0]
        before = algorithm.predict(x)
        for _ in range(2):
            algorithm.update(batches())
        assert not torch.equal(before, algorithm.predict(x))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"gates": "none", "lora_targets": ""}, "nothing to train"),
        ({"gates": "none", "gate_shuffle": True}, "gate_shuffle needs gates"),
        ({"lora_targets": "qx"}, "expected any of the letters"),
        ({"lora_targets": "qq"}, "expected any of the letters"),
        ({"mmd_route": "gate"}, "known: 'gates', 'adapters', 'both'"),
        ({"template": "a photo"}, "expected one {}"),
    ],
)
def test_hparams_that_do_not_go_together(hparams: dict[str, Any], message: str) -> None:
    fixed = {"clip_model": "mini", "clip_pretrained": "shapes"}
    with pytest.raises(UsageError, match=message):
        resolve_hparams("HeadPurification", "PACS", 0, 0, fixed | hparams)


def test_diagnosis_holds_its_bandwidths() -> None:
    algorithm = make("HeadPurification", lr=5e-2)
    minibatches = batches()
    first = algorithm.diagnose(minibatches)
    scales = algorithm.diagnosis_scales
    assert first["gate_shift"] == 0
    for _ in range(3):
        algorithm.update(minibatches)
    second = algorithm.diagnose(minibatches)
    assert second["gate_shift"] > 0.05 and second["val_mmd"] != first["val_mmd"]
    assert scales is algorithm.diagnosis_scales


def test_an_update_is_read_in_four_files() -> None:
    """One update enters at most 20 functions of the method; consecutive repeats count once."""
    root = Path(domainbed_hp.__file__).parent
    algorithm = make("HeadPurification", steps=4)
    algorithm.update(batches())
    entered: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(root):
            name = path.relative_to(root).as_posix()
            if name.startswith(("algorithms/", "prompts/")) or name == "networks/mmd.py":
                entered.append((name, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        algorithm.update(batches())
    finally:
        sys.setprofile(None)
    entries = [entry for i, entry in enumerate(entered) if i == 0 or entry != entered[i - 1]]
    assert ("algorithms/head_purification.py", "backward") in entries
    assert len(entries) <= 20 and len({name for name, _ in entries}) <= 4, entries


@pytest.mark.parametrize(("share", "expected"), [(0.75, 6), (0.0, 1), (0.06, 1), (0.5, 4), (1.0, 8)])
def test_hard_gates_keep_a_share_of_the_heads(share: float, expected: int) -> None:
    algorithm = make("HeadPurification", gates="hard", gate_keep=share).eval()
    gates = algorithm.diagnose([])["gates"]
    assert all(sorted(layer) == [0.0] * (len(layer) - expected) + [1.0] * expected for layer in gates)


# --- The planted head -------------------------------------------------------------------------------------------------


def plant(folder: Path) -> str:
    """A CLIP with one layer and two heads, weights set by hand: head 0 reads the domain, head 1 the class.

    An image is one colour; red says the domain, green the class, +1 or -1 after normalisation. They are written as
    (a, -a, b, -b, 0, 0, 0, 0) into every patch token, so that layer normalisation is a fixed factor. Attention is
    uniform. Each head copies its pair of coordinates to the class token.
    """
    config = json.loads((MINI / "open_clip_config.json").read_text())
    config["model_cfg"] |= {
        "embed_dim": 2,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
    }
    config["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "bytes.txt.gz").write_bytes((MINI / "bytes.txt.gz").read_bytes())
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    visual = model.visual
    block = visual.transformer.resblocks[0]
    with torch.no_grad():
        for p in visual.parameters():
            p.zero_()
        for norm in (visual.ln_pre, visual.ln_post, block.ln_1, block.ln_2):
            norm.weight.fill_(1)
        pair = torch.tensor([1.0, -1.0])
        for channel, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
            visual.conv1.weight[rows, channel] = pair[:, None, None] / 64
        value = block.attn.in_proj_weight[16:]
        value[0:2, 0:2] = value[4:6, 2:4] = torch.eye(2)  # head 0 owns rows 0-3, head 1 rows 4-7
        block.attn.out_proj.weight[0:2, 0:2] = block.attn.out_proj.weight[2:4, 4:6] = torch.eye(2)
        visual.proj[2, 0] = visual.proj[0, 1] = 1  # the class on the first axis, the domain on the second
        model.logit_scale.fill_(torch.tensor(100.0).log())
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def planted(folder: Path, **hparams: Any) -> tuple[list[float], list[dict[str, float]]]:
    """The two gates after 100 real updates, and what was logged."""
    overrides = {"clip_model": "mini", "clip_pretrained": plant(folder), "lr": 5e-3, "weight_decay": 0.0} | hparams
    h = resolve_hparams("HeadPurification", "PACS", 0, 0, overrides) | {"class_names": ["plus", "minus"], "steps": 100}
    algorithm = HeadPurification((3, 16, 16), 2, 2, h)
    algorithm.text.features.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    g = torch.Generator().manual_seed(0)
    logged = []
    for _ in range(100):
        minibatches = []
        for domain in (0.0, 1.0):
            y = torch.randint(2, (12,), generator=g)
            x = torch.zeros(12, 3, 16, 16)
            x[:, 0], x[:, 1], x[:, 2] = domain, (1 - y).float()[:, None, None], 0.5
            minibatches.append((x, y))
        logged.append(algorithm.update(minibatches))
    return algorithm.tower.compute_gates()[0].tolist(), logged


@pytest.mark.parametrize("place", LEVELS)
def test_planted_head_is_closed(tmp_path: Path, place: tuple[str, str]) -> None:
    gates, logged = planted(tmp_path / "clip", mmd_level=place[0], mmd_reach=place[1])
    assert gates[0] < 0.2 and gates[1] > 1.8
    assert all(step["ce"] == 0 for step in logged)  # cross-entropy has nothing to say
    assert logged[-1]["mmd"] < 0.1 * logged[0]["mmd"]


@pytest.mark.parametrize("control", [{"mmd_weight": 0.0}, {"mmd_route": "adapters"}])
def test_planted_head_stays_without_mmd_on_the_gates(tmp_path: Path, control: dict[str, Any]) -> None:
    gates, _ = planted(tmp_path / "clip", **control)
    assert gates == [1, 1]
