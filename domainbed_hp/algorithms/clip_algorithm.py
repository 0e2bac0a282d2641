"""The base of the CLIP methods: an image tower and a text side, which are independent.

A subclass is an image side: it unfreezes or adds parameters of the frozen `tower` and calls `train_with`. The text side
is hparam `prompt`: a template, CoOp, ...; see `domainbed_hp.prompts`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Algorithm, Metrics, Minibatch, declares_capturable, to_log
from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import find_clip, load_clip
from domainbed_hp.networks.compiled import compile_blocks
from domainbed_hp.networks.fused import make_fused_adamw
from domainbed_hp.networks.preprocess import Normalise, Preprocess
from domainbed_hp.networks.vit import Trace, VisionTower
from domainbed_hp.prompts.base import load_text_side_class, make_text_side
from domainbed_hp.registry import PROMPTS, UsageError, refuse_renamed_methods

CLIP_HPARAMS = {
    "clip_model": HParam("ViT-B-16-quickgelu", help="model name of open_clip, or mini, the embedded CLIP"),
    "clip_pretrained": HParam("openai", help="weights: open_clip tag, checkpoint file, local-dir:FOLDER, or random"),
    "prompt": HParam("template", plugins=PROMPTS, help="text side: turns class names into a classifier"),
    "augmentation": HParam("crop_flip", choices=("crop_flip", "domainbed", "none"), help="augmentation in training"),
    "input_norm": HParam(
        "none", choices=("none", "imagenet"), help="normalisation that the input has; imagenet: as in DomainBed"
    ),
    "batch_size": HParam(12, choice(8, 12, 16, 24), "images per environment", at_least=1),
    "accumulate": HParam(
        1, help="number of parts that a step's batch is split into, to save memory; the MMD is per part", at_least=1
    ),
}
ADAMW_HPARAMS = {
    "lr": HParam(5e-4, log_uniform(10, -4.5, -2.5), "learning rate of AdamW, cosine to 0", at_least=0),
    "weight_decay": HParam(0.01, log_uniform(10, -6, -2), "weight decay of AdamW", at_least=0),
}


class ClipAlgorithm(Algorithm):
    """CLIP: logits = T * cos(image feature, text feature of the class), or those of another text side.

    A text side that trains has its own optimizer. A method with its own loss overrides `backward`.
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
                f"{type(self).__name__}: got class names {class_names!r}, expected {num_classes} names. "
                'Pass class_names=[...] or hparams["class_names"].'
            )
        clip = load_clip(hparams["clip_model"], hparams["clip_pretrained"])
        self.tower = clip.visual.requires_grad_(False)
        self.text = make_text_side(clip, class_names, hparams)  # the text tower is freed unless the text side holds it
        self.text.attach(self.tower)
        self.logit_scale = clip.logit_scale
        self.domainbed_norm = Normalise()
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        self.text_optimizer = self.text.make_optimizer()
        self.text_schedule = self.make_cosine_schedule(self.text_optimizer)
        self.steps_done = 0  # a Python number: reading a buffer would wait for the device

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_renamed_methods(cls, {"losses": "backward(minibatches, weight)"})

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        """Return the size and interpolation that belong to the weights, with the augmentation of the hparams."""
        source = find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        return source.preprocess._replace(augmentation=hparams["augmentation"])

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        if hparams["accumulate"] > hparams["batch_size"]:
            raise UsageError(
                f"accumulate: got {hparams['accumulate']}, expected at most batch_size, {hparams['batch_size']}: "
                "each part needs an image of every environment"
            )

    @classmethod
    def has_frozen_features(cls, hparams: dict[str, Any]) -> bool:
        return not cls.IMAGE_SIDE_TRAINS and not load_text_side_class(hparams["prompt"]).CHANGES_TOWER

    @classmethod
    def describe_protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        source = find_clip(hparams["clip_model"], hparams["clip_pretrained"])
        text = load_text_side_class(hparams["prompt"])
        return super().describe_protocol(hparams) | {
            "weights": f"{hparams['clip_model']}, {hparams['clip_pretrained']}",
            "quick_gelu": bool(source.model_cfg.get("quick_gelu", False)),
            "prompt": hparams["prompt"],
            "template": hparams.get("template"),
            "transductive": text.is_transductive(hparams),
            "source_free": not cls.IMAGE_SIDE_TRAINS and (text.SOURCE_FREE or not text.TRAINS),
        }

    def can_capture(self) -> bool:
        return super().can_capture() and declares_capturable(self.text)

    def compile_parts(self) -> None:
        compile_blocks(self)

    def train_with(self, *groups: dict[str, Any]) -> None:
        """Make the optimizer, AdamW, and its cosine schedule of these parameter groups."""
        self.optimizer = make_fused_adamw(groups)
        self.schedule = self.make_cosine_schedule(self.optimizer)

    def make_cosine_schedule(
        self, optimizer: torch.optim.Optimizer | None, steps: int | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return a schedule to 0 over `steps`, by default over `hparams["steps"]`.

        Without an optimizer, or where neither number is known, return None.
        """
        steps = steps or self.hparams.get("steps")
        if optimizer is None or steps is None:
            return None
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def encode(self, x: Tensor, trace: list[Trace] | None = None, tower: VisionTower | None = None) -> Tensor:
        """Return image features (B, E) of x (B, 3, S, S), not unit-norm, in fp32 or better. Features x (B, E) are
        returned unchanged.

        `tower` is used in place of the algorithm's own; each of its layers appends a `Trace` to `trace`.
        """
        if x.dim() == 2:
            return x
        if self.hparams["input_norm"] == "imagenet":  # a stock DomainBed checkout normalises x
            x = self.domainbed_norm.undo(x)
        features: Tensor = (self.tower if tower is None else tower)(x, trace)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def classify(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return logits (B, C) of image features (B, E). `sizes`: images of each domain in a training batch."""
        logits: Tensor = self.text(features, sizes)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        return self.classify(self.encode(x))

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        """Make one step of every optimizer. Return the statistics of `backward`."""
        statistics = self.compute_gradients(minibatches)
        self.step()
        self.steps_done += 1
        return statistics if self.hparams["input_norm"] == "none" else to_log(statistics, self.hparams)

    def compute_gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """Set the gradients of one step and return detached statistics, means over all images.

        With `accumulate`, the gradients of several parts of the minibatches add up. A term that couples images (an MMD,
        a contrastive loss, DPL's mean over a domain) is then the mean over the parts.
        """
        self.zero_grad()
        count = self.hparams["accumulate"]
        parts = split_minibatches(minibatches, count) if count > 1 else [(minibatches, 1.0)]
        statistics: dict[str, Tensor] = {}
        for part, weight in parts:
            for name, value in self.backward(part, weight).items():
                statistics[name] = statistics.get(name, 0.0) + weight * value.detach()
        return statistics | self.text.backward()

    def backward(self, minibatches: list[Minibatch], weight: float) -> dict[str, Tensor]:
        """Add the gradients of `weight` times the loss, here cross-entropy. Return statistics to log.

        `weight` is the share of these images in the step. A returned value is logged; it trains nothing.
        """
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        ce = F.cross_entropy(self.classify(self.encode(x), count_images(minibatches)), y)
        backpropagate(weight * ce)
        return {"ce": ce}

    def step(self) -> None:
        """Make one step of each optimizer and its schedule."""
        for part in (self.optimizer, self.text_optimizer, self.schedule, self.text_schedule):
            if part is not None:
                part.step()

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {"steps_done": self.steps_done}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.steps_done = state["steps_done"]

    def merge(self) -> dict[str, Tensor]:
        """Return the weights of a plain CLIP that computes the same, by open_clip's names; else `UsageError`."""
        if list(self.tower.prompt_tokens()):
            raise UsageError(
                f"{type(self).__name__} with prompt={self.hparams['prompt']} cannot be exported: no CLIP has its tokens"
            )
        return self.tower.merge() | self.text.merge()


def split_minibatches(minibatches: list[Minibatch], count: int) -> list[tuple[list[Minibatch], float]]:
    """Split all environments' minibatches into `count` parts. Return each part with its share of the images."""
    total = sum(count_images(minibatches))
    split = [zip(x.tensor_split(count), y.tensor_split(count), strict=True) for x, y in minibatches]
    parts = map(list, zip(*split, strict=True))
    return [(part, sum(count_images(part)) / total) for part in parts]


def backpropagate(loss: Tensor) -> None:
    """Add the gradients of a loss, unless nothing trains by it."""
    if loss.requires_grad:
        loss.backward()


def count_images(minibatches: list[Minibatch]) -> list[int]:
    """Return the number of images of each environment."""
    return [len(y) for _, y in minibatches]


def unfreeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Set `requires_grad` of the parameters and return them as a list."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


trainable = unfreeze
"""The earlier name of `unfreeze`, for methods outside of this package."""
