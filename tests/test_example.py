"""examples/head_purification.py computes what the package computes, and runs."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from helpers import CLASSES, batches, images, make, randomize

from domainbed_hp.datasets.shapes import shapes_dg
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.hparams_registry import default_hparams
from domainbed_hp.networks.clip import MINI

PATH = Path(__file__).parents[1] / "examples" / "head_purification.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_head_purification", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(example: ModuleType) -> tuple[Any, Any]:
    """The package's algorithm and the example's model with the same weights, in float64; learning rate 0."""
    algorithm = make("HeadPurification", lr=0.0, weight_decay=0.0)
    randomize(algorithm)
    clip = open_clip.create_model(f"local-dir:{MINI}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{MINI}", bpe_path=str(MINI / "bytes.txt.gz"))
    text_features = example.encode_classes(clip, tokenize, CLASSES)
    torch.testing.assert_close(text_features, algorithm.text.features, atol=1e-6, rtol=0)
    model = example.HeadPurification(clip, algorithm.text.features.clone())
    with torch.no_grad():
        for ours, theirs in parameters(algorithm, model):
            theirs.copy_(ours)
    return algorithm.double(), model.double()


def parameters(algorithm: Any, model: Any, grad: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gates, then adapters, of both; `grad`: their gradients."""
    attention = [block.attn for block in algorithm.tower.blocks]
    pairs = [
        (a.gate.gate_logits, model.gate_logits.grad[i] if grad else model.gate_logits[i])
        for i, a in enumerate(attention)
    ]
    for i, a in enumerate(attention):
        for lora, adapter in ((model.lora_q[i], a.adapters["q"]), (model.lora_v[i], a.adapters["v"])):
            for name in ("lora_A", "lora_B"):
                theirs = getattr(lora, name)
                pairs.append((getattr(adapter, name), theirs.grad if grad else theirs))
    trained = [p for p in algorithm.parameters() if p.requires_grad]
    assert {id(p) for p, _ in pairs} == {id(p) for p in trained}
    assert len(pairs) - len(attention) + 1 == sum(p.requires_grad for p in model.parameters())
    return [(p.grad if grad else p, q) for p, q in pairs]


@pytest.mark.parametrize("sizes", [(4, 3, 5), (6,)])
def test_losses_and_gradients_are_the_packages(example: ModuleType, sizes: tuple[int, ...]) -> None:
    algorithm, model = pair(example)
    minibatches = batches(sizes, dtype=torch.float64)
    logged = algorithm.update(minibatches)
    cross_entropy, mmd = example.losses(model, minibatches)
    torch.testing.assert_close(cross_entropy, logged["ce"], atol=0, rtol=1e-6)
    torch.testing.assert_close(mmd, logged["mmd"], atol=0, rtol=1e-6)
    assert (mmd.item() == 0) == (len(sizes) == 1)
    (cross_entropy + example.MMD_WEIGHT * mmd).backward()
    for ours, theirs in parameters(algorithm, model, grad=True):
        assert ours.abs().max() > 1e-6
        torch.testing.assert_close(theirs, ours, atol=1e-6 * ours.abs().max().item(), rtol=1e-6)


def test_the_mmd_reaches_the_gates_alone(example: ModuleType) -> None:
    _, model = pair(example)
    _, mmd = example.losses(model, batches(dtype=torch.float64))
    mmd.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["gate_logits"]
    assert (model.gate_logits.grad.abs().amax(1) > 1e-7).all()


@torch.no_grad()
def test_folded_weights_are_a_plain_clip_that_predicts_the_same(example: ModuleType) -> None:
    algorithm, model = pair(example)
    x = images(3).double()
    expected = model(x)[0]
    torch.testing.assert_close(expected, algorithm.eval().predict(x), atol=1e-8, rtol=1e-8)
    model.fold()
    features = model.visual((x - model.mean) / model.std)
    plain = model.logit_scale * torch.nn.functional.normalize(features, dim=-1) @ model.text_features.T
    torch.testing.assert_close(plain, expected, atol=1e-8, rtol=1e-8)
    merged = algorithm.tower.merge()
    assert all(torch.allclose(merged[f"visual.{k}"], v, atol=1e-10) for k, v in model.visual.state_dict().items())


def test_the_constants_are_the_packages_defaults(example: ModuleType) -> None:
    hparams = default_hparams("HeadPurification", "PACS")
    assert (hparams["lora_rank"], hparams["lora_rank_last"]) == (example.RANK, example.RANK_LAST)
    for name in ("gate_lr_factor", "weight_decay", "mmd_weight", "batch_size"):
        assert getattr(example, name.upper()) == hparams[name]


def test_an_augmented_image_is_a_part_of_the_image(example: ModuleType) -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 64).expand(40, 3, 64, 64)  # brightness says how far to the right
    x = example.augment(ramp)
    width = (x[:, 0, 0, -1] - x[:, 0, 0, 0]).abs()
    assert x.shape == ramp.shape and 0.7**0.5 - 0.03 < width.min() < 0.9 < width.max() <= 1
    assert 8 < (x[:, 0, 0, 0] > x[:, 0, 0, -1]).sum() < 32


def test_main_prints_accuracies(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = torch.arange(10).numpy()
    few = [ArrayImages(shapes_dg.draw_environment(env, 1), labels) for env in shapes_dg.ENVIRONMENTS]
    monkeypatch.setattr(shapes_dg, "build", lambda: few)
    monkeypatch.setattr(example, "BATCH_SIZE", 3)
    results = example.main(["--steps", "2"])
    assert list(results) == list(shapes_dg.ENVIRONMENTS)
    assert all(0 <= value <= 1 for pair in results.values() for value in pair)
    assert (
        sum(before for before, _ in results.values()) > 4 * 0.3
    )  # the small CLIP knows something of them: chance is 0.1
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 5 and lines[0].startswith("unseen A: zero-shot ") and lines[4].startswith("average: zero-shot ")
    )


def test_the_method_imports_nothing_of_the_package() -> None:
    tree = ast.parse(PATH.read_text())
    roots = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, [name.name for name in node.names]) for node in imported if "domainbed" in node.module]
    assert roots | {node.module.split(".")[0] for node in imported} <= {
        *sys.stdlib_module_names,
        "torch",
        "open_clip",
        "domainbed_hp",
    }
    assert ours == [("domainbed_hp.datasets.shapes", ["shapes_dg"]), ("domainbed_hp.networks.clip", ["MINI"])]
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert sum(isinstance(node, ast.ImportFrom) for node in ast.walk(main)) == len(ours)
