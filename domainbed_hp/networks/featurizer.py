"""Featurizer and classifier of the classic algorithms (DomainBed's networks.py): ResNet, a CLIP tower, a small CNN.

Every featurizer takes x (B, 3, S, S) in [0, 1], normalises it for itself and gives (B, `n_outputs`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from domainbed_hp.networks.preprocess import Normalise
from domainbed_hp.registry import UsageError, unknown_name

RESNETS = ("resnet18", "resnet50")
BACKBONES = (*RESNETS, "clip", "small")


class ResNet(nn.Module):
    """torchvision's ResNet with dropout in place of its last layer.

    `freeze_bn`: the statistics of batch norms do not change.
    """

    def __init__(self, name: str, weights: str, dropout: float, freeze_bn: bool) -> None:
        super().__init__()
        self.normalise = Normalise()
        self.network = load_resnet(name, weights)
        self.n_outputs = self.network.fc.in_features
        self.network.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.freeze_bn = freeze_bn
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.network(self.normalise(x)))
        return features

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_bn:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def load_resnet(name: str, weights: str) -> models.ResNet:
    """Return a ResNet with weights "imagenet" (IMAGENET1K_V1), "random", or from a file, whose `fc` is not read."""
    build: Callable[..., models.ResNet] = {"resnet18": models.resnet18, "resnet50": models.resnet50}[name]
    if weights == "random":
        return build()
    if weights == "imagenet":
        try:
            return build(weights="IMAGENET1K_V1")
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"cannot download the ImageNet weights of {name} ({error}). Set hparam backbone_weights to the path "
                "of torchvision's .pth file, or to 'random'"
            ) from error
    network = build()
    expected = {key for key in network.state_dict() if not key.startswith("fc.")}
    state = {key: value for key, value in read_state(weights).items() if key in expected}
    if missing := sorted(expected - set(state)):
        raise UsageError(
            f"hparam backbone_weights: {weights} lacks {len(missing)} tensors of {name}, e.g. {missing[0]}"
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"hparam backbone_weights: {weights} does not fit {name}: {error}") from error
    return network


def read_state(path: str) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors file or a file of torch.save. No code in the file is run."""
    if not Path(path).is_file():
        raise UsageError(f"hparam backbone_weights: got {path!r}, expected 'imagenet', 'random' or the path of a file")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise UsageError(
            f"hparam backbone_weights: {path} is no state dict of tensors, by torch.save or safetensors: {error}"
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"hparam backbone_weights: {path} holds a {type(state).__name__}, expected a state dict")
    return state


class SmallCNN(nn.Module):
    """Four convolutions with group norm, for images of 16 pixels or more: DomainBed's MNIST_CNN."""

    # DEVIATION: all four convolutions halve the side, not the second alone, for images of 64 pixels; x is centred.
    n_outputs = 128

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise((0.5,) * 3, (0.5,) * 3)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 64), (64, 128), (128, 128), (128, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU(), nn.GroupNorm(8, outputs)]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(self.normalise(x))
        return features


class CLIPTower(nn.Module):
    """The image tower of a CLIP. All of it trains."""

    def __init__(self, model: str, pretrained: str) -> None:
        super().__init__()
        from domainbed_hp.networks.clip import load_clip

        clip = load_clip(model, pretrained)
        self.network = clip.visual.requires_grad_(True)
        self.n_outputs: int = clip.embed_dim

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)
        return features


def make_classifier(inputs: int, outputs: int, nonlinear: bool) -> nn.Module:
    """Return DomainBed's Classifier: one linear layer, or three with a half and a quarter of the width."""
    if not nonlinear:
        return nn.Linear(inputs, outputs)
    half, quarter = nn.Linear(inputs, inputs // 2), nn.Linear(inputs // 2, inputs // 4)
    return nn.Sequential(half, nn.ReLU(), quarter, nn.ReLU(), nn.Linear(inputs // 4, outputs))


def make_featurizer(
    backbone: str,
    *,
    weights: str = "imagenet",
    dropout: float = 0.0,
    freeze_bn: bool = False,
    clip_model: str = "ViT-B-16-quickgelu",
    clip_pretrained: str = "openai",
) -> ResNet | SmallCNN | CLIPTower:
    """Return the network called `backbone`. Options of other backbones are ignored."""
    if backbone in RESNETS:
        return ResNet(backbone, weights, dropout, freeze_bn)
    if backbone == "clip":
        return CLIPTower(clip_model, clip_pretrained)
    if backbone == "small":
        return SmallCNN()
    raise unknown_name("backbone", backbone, BACKBONES)
