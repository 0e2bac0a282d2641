"""Cho et al., "PromptStyler: Prompt-driven Style Generation for Source-free Domain Generalization", ICCV 2023."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.text import Sentences, TextTower
from domainbed_hp.prompts.base import unit
from domainbed_hp.prompts.text_only import TextOnly

BATCH = 128


class PromptStyler(TextOnly):
    """Learned style words S*, one after another, then a linear classifier of "a S* style of a {class}".

    1. A style differs from the earlier ones and preserves the content: L = L_style + L_content.
    2. The classifier trains by ArcFace on the text features of all styles and classes; its normalised rows are the
       class features. Nothing trains on images.
    """

    CAPTURABLE = True
    HPARAMS = {
        "styler_styles": HParam(80, help="K: number of styles", at_least=1),
        "styler_steps": HParam(100, help="training steps per style", at_least=0),
        "styler_lr": HParam(2e-3, log_uniform(10, -4, -2), "learning rate of the styles: SGD, constant", at_least=0),
        "styler_epochs": HParam(50, help="training epochs of the classifier, in batches of 128", at_least=0),
        "styler_classifier_lr": HParam(
            5e-3,
            log_uniform(10, -3.5, -1),
            "learning rate of the classifier: SGD, momentum 0.9; the paper does not state it clearly",
            at_least=0,
        ),
        "styler_scale": HParam(5.0, help="scale s of ArcFace", at_least=0),
        "styler_margin": HParam(0.5, help="margin m of ArcFace, in radians", at_least=0),
    }

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        names = [name.replace("_", " ") for name in class_names]
        tower = clip.make_text_tower()
        styled = Sentences(tower, "a", 1, ["style of a", *(f"style of a {name}" for name in names)])
        self.helpers += [tower, styled, Sentences(tower, "", 0, names)]

    def fit(self) -> Tensor:
        return self.train_classifier(self.learn_styles()[:, 1:])

    def learn_styles(self) -> Tensor:
        """Return unit-norm features (K, 1 + C, E) of "a S* style of a" and of every class in that style."""
        tower, styled, contents = cast("tuple[TextTower, Sentences, Sentences]", self.helpers)

        def encode(sentences: Sentences, vectors: Tensor) -> Tensor:
            return unit(tower(sentences(vectors), sentences.ends))

        content = encode(contents, self.features.new_empty(1, 0, tower.width))
        styles: list[Tensor] = []
        for _ in tqdm(range(self.hparams["styler_styles"]), "PromptStyler", disable=None, unit="style"):
            word = nn.Parameter(torch.randn(1, 1, tower.width).to(self.features) * 0.02)
            optimizer = torch.optim.SGD([word], self.hparams["styler_lr"], momentum=0.9)
            for _ in range(self.hparams["styler_steps"]):
                style = encode(styled, word)
                loss = compute_style_loss(style[0], [other[0] for other in styles])
                loss = loss + compute_content_loss(style[1:], content)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            styles.append(encode(styled, word).detach())
        return torch.stack(styles)

    def train_classifier(self, features: Tensor) -> Tensor:
        """Return classifier weights (C, E) of any length, trained on text features (K, C, E)."""
        h, (styles, classes, size) = self.hparams, features.shape
        x, y = features.flatten(0, 1), torch.arange(classes, device=features.device).repeat(styles)
        weight = nn.Parameter(nn.Linear(size, classes, bias=False).weight.detach().to(x))
        optimizer = torch.optim.SGD([weight], h["styler_classifier_lr"], momentum=0.9)
        for _ in range(h["styler_epochs"]):
            for batch in torch.randperm(len(x)).to(x.device).split(BATCH):
                # DEVIATION: the re-implementation of PromptTA does not normalise the weights.
                cosines = x[batch] @ unit(weight).T
                logits = compute_arcface_logits(cosines, y[batch], h["styler_scale"], h["styler_margin"])
                optimizer.zero_grad()
                F.cross_entropy(logits, y[batch]).backward()
                optimizer.step()
        return weight


def compute_style_loss(style: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Return the mean |cos| of a style (E) with the earlier ones, 0 for the first. All are unit-norm."""
    return torch.stack([style @ other for other in earlier]).abs().mean() if earlier else style.new_zeros(())


def compute_content_loss(styled: Tensor, content: Tensor) -> Tensor:
    """Return the cross-entropy by which a class in this style (C, E) is closest to its own name (C, E)."""
    return F.cross_entropy(styled @ content.T, torch.arange(len(content), device=content.device))


def compute_arcface_logits(cosines: Tensor, y: Tensor, scale: float, margin: float) -> Tensor:
    """Return logits s cos(angle), s cos(angle + m) for the true class (ArcFace, Deng et al., 2019)."""
    sines = (1 - cosines**2).clamp_min(1e-12).sqrt()  # the root has no slope at 0
    shifted = cosines * math.cos(margin) - sines * math.sin(margin)
    return scale * torch.where(F.one_hot(y, cosines.shape[1]).bool(), shifted, cosines)
