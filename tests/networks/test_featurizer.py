import os
import pickle
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from domainbed_hp.networks.featurizer import ResNet, make_classifier, make_featurizer
from domainbed_hp.networks.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalise
from domainbed_hp.registry import UsageError


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return models.resnet18()


@pytest.mark.parametrize("size", [16, 28, 45, 64])
def test_small_takes_any_size(size):
    network = make_featurizer("small")
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.n_outputs) == (2, 128)


def test_resnet_has_no_last_layer_and_normalises_inside(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "weights.pth")
    network = make_featurizer("resnet18", weights=str(tmp_path / "weights.pth")).eval()
    x = torch.rand(2, 3, 64, 64)
    resnet18.eval()
    theirs = nn.Sequential(*list(resnet18.children())[:-1], nn.Flatten())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert network.n_outputs == 512
    torch.testing.assert_close(network(x), theirs((x - mean) / std))


def test_resnet50_width():
    assert make_featurizer("resnet50", weights="random").n_outputs == 2048


def test_safetensors_equal_pth(resnet18, tmp_path):
    state = {name: value for name, value in resnet18.state_dict().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    a, b = (make_featurizer("resnet18", weights=str(tmp_path / f"weights.{end}")) for end in ("safetensors", "pth"))
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_bad_weights_are_refused(resnet18, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = resnet18.state_dict()
    torch.save(state, "good.pth")
    torch.save({k: v for k, v in state.items() if k != "conv1.weight"}, "short.pth")
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "shape.pth")
    torch.save([1, 2], "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"conv1.weight": Harmful()}, protocol=2))
    for name, message in (
        ("nowhere.pth", "expected 'imagenet', 'random' or the path of a file"),
        ("short.pth", "lacks 1 tensors of resnet18, e.g. conv1.weight"),
        ("shape.pth", "does not fit resnet18"),
        ("list.pth", "holds a list"),
        ("text.pth", "is no state dict"),
        ("text.safetensors", "is no state dict"),
        ("code.pth", "is no state dict"),
    ):
        with pytest.raises(UsageError, match=message):
            make_featurizer("resnet18", weights=name)
    with pytest.raises(UsageError, match="lacks .* tensors of resnet50"):
        make_featurizer("resnet50", weights="good.pth")
    assert not (tmp_path / "harm").exists()


def test_imagenet_weights_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match="no network.*backbone_weights to the path"):
        make_featurizer("resnet18")


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_bn(frozen):
    network = make_featurizer("resnet18", weights="random", freeze_bn=frozen).train()
    before = network.network.bn1.running_mean.clone()
    network(torch.rand(2, 3, 32, 32))
    assert torch.equal(network.network.bn1.running_mean, before) == frozen


def test_dropout_in_training_only():
    network = ResNet("resnet18", "random", 0.5, False)
    x = torch.rand(4, 3, 32, 32)
    network.eval()
    assert torch.equal(network(x), network(x))
    network.train()
    assert 0.3 < (network(x) == 0).float().mean() < 0.7


def test_clip_tower_trains_whole():
    network = make_featurizer("clip", clip_model="mini", clip_pretrained="random")
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, network.n_outputs) == (2, 128)
    assert all(p.requires_grad for p in network.parameters())


def test_classifier():
    assert isinstance(make_classifier(8, 3, False), nn.Linear)
    deep = make_classifier(8, 3, True)
    assert [layer.out_features for layer in deep if isinstance(layer, nn.Linear)] == [4, 2, 3]


def test_normalise_undoes_itself():
    normalise, x = Normalise(), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(normalise.undo(normalise(x)), x)


def test_unknown_backbone():
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        make_featurizer("resnet-18")
