import pytest
import torch

from domainbed_hp.algorithms.base import get_algorithm_class
from domainbed_hp.algorithms.erm import ERM
from domainbed_hp.hparams_registry import default_hparams
from domainbed_hp.networks.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess


def build(dataset="Debug28", size=28, num_classes=2, **overrides):
    torch.manual_seed(0)
    hparams = default_hparams("ERM", dataset) | overrides
    return ERM((3, size, size), num_classes, 2, hparams)


def minibatches(size=28):
    """Bright images are class 1."""
    y = torch.arange(8) % 2
    return [(torch.rand(8, 3, size, size) * 0.5 + y.view(-1, 1, 1, 1) * 0.5, y) for _ in range(2)]


def test_it_is_registered():
    assert get_algorithm_class("ERM") is ERM


def test_it_learns():
    algorithm = build()
    batches = minibatches()
    losses = [algorithm.update(batches)["loss"] for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert algorithm.predict(batches[0][0]).shape == (8, 2)
    assert (algorithm.predict(batches[0][0]).argmax(1) == batches[0][1]).float().mean() > 0.9


def test_the_loss_is_the_cross_entropy_of_the_joined_minibatches():
    algorithm = build()
    (x0, y0), (x1, y1) = batches = minibatches()
    expected = torch.nn.functional.cross_entropy(algorithm.predict(torch.cat([x0, x1])), torch.cat([y0, y1])).item()
    assert algorithm.update(batches) == {"loss": pytest.approx(expected)}


def test_every_parameter_is_trained_once():
    algorithm = build(lr=0.125, weight_decay=0.25)
    (group,) = algorithm.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in algorithm.parameters()}
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    before = [p.clone() for p in algorithm.parameters()]
    algorithm.update(minibatches())
    assert all(not torch.equal(p, old) for p, old in zip(algorithm.parameters(), before, strict=True))


def test_the_trained_state_is_the_whole_model():
    algorithm = build()
    state = algorithm.trained_state()
    assert set(state) == set(algorithm.state_dict())
    other = build(nonlinear_classifier=False)
    algorithm.update(minibatches())
    other.load_state_dict(algorithm.trained_state())
    x = torch.rand(3, 3, 28, 28)
    assert torch.equal(other.eval().predict(x), algorithm.eval().predict(x))


def test_imagenet_normalised_images_are_undone():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = torch.rand(2, 3, 28, 28)
    plain, stock = build().predict(x), build(input_norm="imagenet").predict((x - mean) / std)
    torch.testing.assert_close(plain, stock, atol=1e-5, rtol=1e-4)


def test_hparams_reach_the_network():
    algorithm = build(backbone="resnet18", backbone_weights="random", resnet_dropout=0.1, freeze_bn=True)
    assert algorithm.featurizer.dropout.p == 0.1 and algorithm.featurizer.freeze_bn
    assert len(build(nonlinear_classifier=True).classifier) == 5


@pytest.mark.parametrize("backbone", ["resnet50", "small"])
def test_pixels_are_domainbeds(backbone):
    hparams = default_hparams("ERM", "PACS") | {"backbone": backbone}
    assert ERM.preprocess(hparams, 224) == Preprocess(224, "squash", "bilinear", "domainbed")
    assert ERM.preprocess(hparams | {"data_augmentation": False}, 64) == Preprocess(64, "squash", "bilinear", "none")


def test_clip_takes_its_own_pixels_and_trains():
    clip = {"backbone": "clip", "clip_model": "mini", "clip_pretrained": "random"}
    hparams = default_hparams("ERM", "PACS") | clip
    assert ERM.preprocess(hparams, 224) == Preprocess(64, "crop", "bicubic", "domainbed")
    algorithm = build("PACS", 64, **clip)
    before = [p.clone() for p in algorithm.featurizer.parameters()]
    assert algorithm.update(minibatches(64))["loss"] > 0
    assert all(not torch.equal(p, old) for p, old in zip(algorithm.featurizer.parameters(), before, strict=True))


def test_backbone_follows_the_data_set():
    backbones = {name: default_hparams("ERM", name)["backbone"] for name in ("Debug28", "ShapesDG", "Debug224", "PACS")}
    assert backbones == {"Debug28": "small", "ShapesDG": "small", "Debug224": "resnet50", "PACS": "resnet50"}


def test_the_weights_it_says_it_starts_from():
    hparams = default_hparams("ERM", "PACS")
    terms = [ERM.describe_protocol(hparams | {"backbone": name}) for name in ("resnet18", "clip", "small")]
    assert [term["weights"] for term in terms] == ["resnet18, imagenet", "ViT-B-16-quickgelu, openai", None]
