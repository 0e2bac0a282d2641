import copy
from collections import OrderedDict
from itertools import combinations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import images, make, randomize
from torch import nn

from domainbed_hp.networks.clip import load_clip
from domainbed_hp.networks.heads import GatedProjection, HeadAttention, HeadGate, HeadLoRA, OutputHeadLoRA
from domainbed_hp.networks.vit import VisionTower

TARGETS = ["".join(t) for n in range(1, 5) for t in combinations("qkvo", n)]


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return load_clip("mini", "shapes").visual.eval()


def vit_b_16() -> VisionTower:
    """Shapes only, on the meta device."""
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=True)
        tower = VisionTower(visual, (0.5,) * 3, (0.5,) * 3)
    return tower


def count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("targets", "rank", "rank_last", "shared", "expected"),
    [
        ("qv", 2, 8, True, 110_592),
        ("q", 2, 8, True, 55_296),
        ("v", 2, 8, True, 55_296),
        ("qv", 2, 8, False, 718_848),
        ("qv", 13, 52, True, 718_848),
        ("o", 2, 8, True, 55_296),
        ("o", 2, 8, False, 359_424),
    ],
)
def test_trainable_parameters_on_vit_b_16(targets: str, rank: int, rank_last: int, shared: bool, expected: int) -> None:
    with torch.device("meta"):
        assert count(vit_b_16().add_adapters(targets, rank, rank_last, shared)) == expected


def test_gates_on_vit_b_16() -> None:
    with torch.device("meta"):
        assert count(vit_b_16().add_gates("softmax", 9)) == 144


def test_tower_equals_open_clip(tower: VisionTower) -> None:
    stock = open_clip.create_model(load_clip("mini", "shapes").source.name).eval().double()
    own, x = copy.deepcopy(tower).double(), images(4).double()
    with torch.no_grad():
        expected = stock.encode_image(own.normalise(x))
        torch.testing.assert_close(own(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shared", [False, True])
def test_start_is_the_frozen_encoder(tower: VisionTower, targets: str, shared: bool) -> None:
    adapted = copy.deepcopy(tower)
    adapted.add_adapters(targets, 2, 8, shared)
    x = images(2)
    with torch.no_grad():
        for kind in ("softmax", "sigmoid", "none"):
            adapted.add_gates(kind, 1)
            a, b = F.normalize(adapted.train()(x), dim=-1), F.normalize(tower(x), dim=-1)
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "hard"])
def test_merged_weights_compute_the_same(tower: VisionTower, targets: str, shared: bool, kind: str) -> None:
    adapted = copy.deepcopy(tower)
    adapted.add_adapters(targets, 2, 8, shared)
    adapted.add_gates(kind, 6)
    randomize(adapted)
    adapted.eval()
    plain = copy.deepcopy(tower)
    plain.load_state_dict({k.removeprefix("visual."): v for k, v in adapted.merge().items()})
    x = images(2)
    with torch.no_grad():
        assert (adapted(x) - tower(x)).abs().max() > 1e-2  # the adapters do something
        torch.testing.assert_close(plain(x), adapted(x), atol=2e-4, rtol=1e-4)


def test_head_lora_is_a_product_per_head() -> None:
    torch.manual_seed(0)
    lora = HeadLoRA(12, 3, 2)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 12)
    expected = torch.cat([x @ lora.lora_A[i] @ lora.lora_B[i] for i in range(3)], dim=-1)
    torch.testing.assert_close(lora(x, torch.zeros_like(x)), expected)
    torch.testing.assert_close(x @ lora.compute_delta_weight(), expected)


def test_shared_lora_is_one_low_rank_product() -> None:
    torch.manual_seed(0)
    lora = HeadLoRA(12, 3, 2, shared=True)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(lora(x, torch.ones_like(x)), 1 + x @ lora.compute_delta_weight())
    assert torch.linalg.matrix_rank(lora.compute_delta_weight()) == 2
    assert len(lora.lora_A) == 1


def test_output_lora_reads_each_head_alone() -> None:
    torch.manual_seed(0)
    for shared in (False, True):
        lora = OutputHeadLoRA(12, 3, 2, shared)
        nn.init.normal_(lora.lora_B)
        heads = torch.randn(2, 5, 3, 4)
        x = heads.flatten(-2)
        torch.testing.assert_close(lora(x, x), x + x @ lora.compute_delta_weight())
        assert torch.linalg.matrix_rank(lora.compute_delta_weight()) == (2 if shared else 6)


def test_gates() -> None:
    softmax, sigmoid = HeadGate(4, "softmax", 1), HeadGate(4, "sigmoid", 1)
    for gate in (softmax, sigmoid):
        assert torch.equal(gate(), torch.ones(4))
        with torch.no_grad():
            gate.gate_logits.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert softmax().sum().item() == pytest.approx(4)
    # by hand: 4 e^3 / (1 + e + e^2 + e^3), and 2 / (1 + e^-3)
    assert softmax()[3].item() == pytest.approx(2.575656)
    assert sigmoid()[3].item() == pytest.approx(1.905148)


def test_gradients_of_the_gated_projection() -> None:
    """All inputs have the right gradients, also W_o, which no method trains under gates."""
    torch.manual_seed(0)
    shapes = ((2, 3, 2, 4), (2,), (8, 8), (8,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(GatedProjection.apply, inputs)
    heads, gates, weight, bias = (t.detach().float().requires_grad_() for t in inputs)
    GatedProjection.apply(heads.bfloat16(), gates, weight, bias).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (heads, gates, weight, bias))


def test_hard_gate_keeps_the_best_in_evaluation_and_explores_in_training() -> None:
    torch.manual_seed(0)
    gate = HeadGate(6, "hard", 2)
    with torch.no_grad():
        gate.gate_logits.copy_(torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0]))
    assert gate.eval()().tolist() == [0, 1, 0, 1, 0, 0]
    gate.train()
    draws = torch.stack([gate() for _ in range(50)])
    torch.testing.assert_close(draws.sum(1), torch.full((50,), 2.0))
    assert draws[:, 1].sum() > 25 and len(draws.detach().round().unique(dim=0)) > 1
    (gradient,) = torch.autograd.grad((draws[0] * torch.arange(6.0)).sum(), gate.gate_logits)
    assert gradient.abs().sum() > 0


def test_shuffled_gates_are_a_control_of_evaluation() -> None:
    plain, shuffled = (make("HeadPurification", gate_shuffle=flag) for flag in (False, True))
    for algorithm in (plain, shuffled):
        randomize(algorithm)
    assert torch.equal(plain.tower.compute_gates(), shuffled.tower.compute_gates())  # training
    before, after = plain.eval().tower.compute_gates(), shuffled.eval().tower.compute_gates()
    assert not torch.equal(before, after)
    assert torch.equal(before.sort().values, after.sort().values)


class SuccessorAttention(nn.Module):
    """Stand-in for open_clip's own `Attention(x, k_x, v_x, attn_mask)`: same parameters, another signature."""

    def __init__(self, pretrained: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = pretrained.num_heads
        self.in_proj_weight, self.in_proj_bias = pretrained.in_proj_weight, pretrained.in_proj_bias
        self.out_proj = nn.Linear(pretrained.embed_dim, pretrained.embed_dim)
        self.out_proj.load_state_dict(pretrained.out_proj.state_dict())

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def test_takes_over_either_attention_of_open_clip() -> None:
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(stock.in_proj_bias)
    successor = SuccessorAttention(stock)
    x = torch.randn(2, 5, 12)
    expected = stock(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(HeadAttention(stock)(x), expected)
    torch.testing.assert_close(HeadAttention(successor)(x), expected)
    assert HeadAttention(successor).state_dict().keys() == stock.state_dict().keys()


def test_tower_on_blocks_of_the_successor() -> None:
    model = open_clip.create_model(load_clip("mini", "shapes").source.name).eval()
    mean = std = (0.5, 0.5, 0.5)
    x = images(2)
    with torch.no_grad():
        expected = model.encode_image((x - 0.5) / 0.5)
        for block in model.visual.transformer.resblocks:
            block.attn = SuccessorAttention(block.attn)
        visual = VisionTower(model.visual, mean, std)
        torch.testing.assert_close(visual(x), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(visual.state_dict(), OrderedDict)
    assert {f"visual.{k}" for k in visual.state_dict()} == set(visual.merge())
