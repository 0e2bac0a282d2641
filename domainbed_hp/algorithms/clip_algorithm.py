"""What the CLIP methods share: an image tower, frozen until a subclass says otherwise, and a text side.

The two are orthogonal. A subclass is an image side: it unfreezes or adds parameters to `tower` and says what trains
them. The text side is hparam `prompt`: a template, CoOp, ...; see `domainbed_hp.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Algorithm, Metrics, Minibatch, Preprocess, join, logged, says_capturable
from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import find_clip, load_clip
from domainbed_hp.networks.compiled import compile_blocks
from domainbed_hp.networks.fused import fused_adamw
from domainbed_hp.networks.preprocess import Normalise
from domainbed_hp.networks.vit import Trace, VisionTower
from domainbed_hp.prompts.base import prompt_class, text_side
from domainbed_hp.registry import PROMPTS, UsageError

CLIP_HPARAMS = {
    "clip_model": HParam("ViT-B-16-quickgelu", help="open_clip model name, or mini"),
    "clip_pretrained": HParam("openai", help="tag, checkpoint file, local-dir:FOLDER, or random"),
    "prompt": HParam("template", plugins=PROMPTS, help="the text side"),
    "augmentation": HParam("crop_flip", choices=("crop_flip", "domainbed", "none"), help="of training images"),
    "input_norm": HParam("none", choices=("none", "imagenet"), help="imagenet: x comes normalised, as in DomainBed"),
    "batch_size": HParam(12, choice(8, 12, 16, 24), "images per environment", at_least=1),
    "accumulate": HParam(
        1, help="parts of a batch, one after the other, for memory; an MMD is each part's", at_least=1
    ),
}
ADAMW_HPARAMS = {
    "lr": HParam(5e-4, log_uniform(10, -4.5, -2.5), "AdamW, cosine to 0", at_least=0),
    "weight_decay": HParam(0.01, log_uniform(10, -6, -2), at_least=0),
}


class ClipAlgorithm(Algorithm):
    """CLIP: logits = T * cos(image feature, text feature of the class), or whatever the text side makes of it.

    Of the image tower nothing trains until a subclass says so: it unfreezes or adds parameters, then calls
    `train_with`. A text side that trains has an optimizer of its own.
    """

    HPARAMS = CLIP_HPARAMS
    IMAGE_SIDE_TRAINS: ClassVar[bool] = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        class_names = class_names or hparams.get("class_names")
        if not class_names or len(class_names) != num_classes:
            raise UsageError(
                f"{type(self).__name__}: got class names {class_names!r}, expected {num_classes}. "
                'Pass class_names=[...] or hparams["class_names"].'
            )
        clip = load_clip(hparams["clip_model"], hparams["clip_pretrained"])
        self.tower = clip.visual.requires_grad_(False)
        self.text = text_side(clip, class_names, hparams)  # the text tower is dropped here, unless this keeps it
        self.text.attach(self.tower)
        self.logit_scale = clip.logit_scale
        self.domainbed_norm = Normalise()
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        self.text_optimizer = self.text.optimizer()
        self.text_schedule = self.cosine(self.text_optimizer)
        self.steps_done = 0  # no buffer: to read one, a step would wait for the device

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        """The tower's own size and interpolation, short side and centre crop."""
        source = find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        return source.preprocess._replace(augmentation=hparams["augmentation"])

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        if hparams["accumulate"] > hparams["batch_size"]:
            at_most = f"expected at most batch_size, {hparams['batch_size']}"
            raise UsageError(f"accumulate: got {hparams['accumulate']}, {at_most}: each part has images of all")

    @classmethod
    def frozen(cls, hparams: dict[str, Any]) -> bool:
        return not cls.IMAGE_SIDE_TRAINS and not prompt_class(hparams["prompt"]).REACHES_IN

    @classmethod
    def protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        source, text = find_clip(hparams["clip_model"], hparams["clip_pretrained"]), prompt_class(hparams["prompt"])
        return super().protocol(hparams) | {
            "weights": f"{hparams['clip_model']}, {hparams['clip_pretrained']}",
            "quick_gelu": bool(source.model_cfg.get("quick_gelu", False)),
            "prompt": hparams["prompt"],
            "template": hparams.get("template"),
            "transductive": text.transductive(hparams),
            "source_free": not cls.IMAGE_SIDE_TRAINS and (text.SOURCE_FREE or not text.TRAINS),
        }

    def capturable(self) -> bool:
        return super().capturable() and says_capturable(self.text)

    def compile_parts(self) -> None:
        compile_blocks(self)

    def train_with(self, *groups: dict[str, Any]) -> None:
        """AdamW over parameter groups, with the cosine."""
        self.optimizer = fused_adamw(groups)
        self.schedule = self.cosine(self.optimizer)

    def cosine(
        self, optimizer: torch.optim.Optimizer | None, steps: int | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """To 0 over `steps`, or all of `hparams["steps"]`, which the harness gives; else constant."""
        steps = steps or self.hparams.get("steps")
        if optimizer is None or steps is None:
            return None
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(self) -> None:
        """One step of each optimizer and its schedule."""
        for part in (self.optimizer, self.text_optimizer, self.schedule, self.text_schedule):
            if part is not None:
                part.step()

    def encode(self, x: Tensor, trace: list[Trace] | None = None, tower: VisionTower | None = None) -> Tensor:
        """Image features (B, E), not unit-norm, in fp32 or better, by `tower` or its own; features as x pass."""
        if x.dim() == 2:
            return x
        if self.hparams["input_norm"] == "imagenet":  # a stock DomainBed checkout normalises before us
            x = self.domainbed_norm.undo(x)
        features: Tensor = (self.tower if tower is None else tower)(x, trace)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def classify(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C) of image features (B, E); `sizes` of the domains in a training batch."""
        logits: Tensor = self.text(features, sizes)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        return self.classify(self.encode(x))

    def losses(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """The terms whose sum trains, scalars with their graphs: here cross-entropy over all environments' images."""
        x, y = join(minibatches)
        return {"ce": F.cross_entropy(self.classify(self.encode(x), sizes(minibatches)), y)}

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        """One step down the sum of `losses`, mean over all images, and of the text side's own."""
        losses = self.gradients(minibatches)
        self.step()
        self.steps_done += 1
        return logged(losses, self.hparams)

    def gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """Leave on the parameters the gradients of a step; returns its losses, detached.

        With `accumulate` those of several parts of the minibatches add up to those of the whole. A term that couples
        images (an MMD, a contrastive loss, DPL's mean over a domain) is then the mean of the parts' own.
        """
        self.zero_grad()
        losses: dict[str, Tensor] = {}
        for part, share in parts(minibatches, self.hparams["accumulate"]):
            for name, loss in self.backward(part, share).items():
                losses[name] = losses.get(name, 0.0) + share * loss.detach()
        own = self.text.losses()
        add_gradients(own)
        return losses | {name: loss.detach() for name, loss in own.items()}

    def backward(self, minibatches: list[Minibatch], share: float) -> dict[str, Tensor]:
        """Add the gradients of `losses`, times the share that these images have in the step; returns the losses."""
        losses = self.losses(minibatches)
        add_gradients(losses, share)
        return losses

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {"steps_done": self.steps_done}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.steps_done = state["steps_done"]

    def merge(self) -> dict[str, Tensor]:
        """The weights of a plain CLIP that computes the same, under open_clip's names; `UsageError` if none does."""
        if list(self.tower.prompts()):
            raise UsageError(
                f"{type(self).__name__} with prompt={self.hparams['prompt']} adds tokens; no plain CLIP does"
            )
        return self.tower.merge() | self.text.merge()


def parts(minibatches: list[Minibatch], count: int) -> Iterator[tuple[list[Minibatch], float]]:
    """All environments' minibatches in `count` parts, each with its share of the images."""
    total = sum(sizes(minibatches))
    split = [zip(x.tensor_split(count), y.tensor_split(count), strict=True) for x, y in minibatches]
    for part in map(list, zip(*split, strict=True)):
        yield part, sum(sizes(part)) / total


def add_gradients(losses: dict[str, Tensor], share: float = 1.0) -> None:
    """Those of the sum of `losses`, where anything trains by it."""
    total = share * sum(losses.values())
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()


def sizes(minibatches: list[Minibatch]) -> list[int]:
    """Images of each environment."""
    return [len(x) for x, _ in minibatches]


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The same parameters, unfrozen."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
