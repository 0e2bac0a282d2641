"""The contract: a method is `__init__ / update / predict`, as in DomainBed's algorithms.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import ALGORITHMS, load

Minibatch = tuple[Tensor, Tensor]
"""One environment's (x, y): x (B, 3, S, S) in [0, 1], not normalised; y (B,) int64."""

Metrics = Mapping[str, float | Tensor]
"""What a step logs. Detached tensors of one number stay on their device until a record reads them: no step waits."""


class Algorithm(nn.Module):
    """A domain generalization method.

    `num_domains` counts training environments. Subclasses that need class names (CLIP) take them as keyword
    `class_names`, or read `hparams["class_names"]`.
    """

    HPARAMS: ClassVar[dict[str, HParam]] = {
        "batch_size": HParam(32, lambda r: int(2 ** r.uniform(3, 5.5)), "images per environment", at_least=1)
    }
    CAPTURABLE: ClassVar[bool] = False
    """`gradients` does the same work at every step, whatever the step and the images, and changes nothing but gradients
    and batch norms: no branch on a number, none read back. Then a GPU captures it: Python runs it a few times and never
    again. Not inherited: a subclass that computes something else says so for itself."""
    STEPS: ClassVar[int | None] = None
    """Number of steps that the method needs; None: the data set's. 1 for methods that do not train."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.hparams = hparams

    @classmethod
    def hparams_for(cls, dataset: str) -> dict[str, HParam]:
        """The hparams that this method reads; override where defaults depend on the data set."""
        return cls.HPARAMS

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """`UsageError` for hparams that do not go together, before anything is built."""

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        """The images that this method wants, known without building it; `image_size` is the data set's own."""
        return Preprocess(image_size)

    @classmethod
    def frozen(cls, hparams: dict[str, Any]) -> bool:
        """Whether `encode(x)` never changes, and features in place of images pass `update` and `predict`."""
        return False

    @classmethod
    def protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        """Under what terms this method's numbers stand, for every record: plain values, None for what it has not.

        `weights` it starts from, `template` of a class, `transductive`: predictions need a whole batch, `source_free`.
        """
        return {"weights": None, "template": None, "transductive": False, "source_free": False}

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        """One training step on one minibatch per training environment; returns what to log."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """Leave on the parameters the gradients of a step; returns its losses, detached. The part of `update` before
        the optimizer's, where a method has it apart."""
        raise NotImplementedError(f"{type(self).__name__}.gradients")

    def capturable(self) -> bool:
        """`CAPTURABLE`, where it depends on hparams."""
        return says_capturable(self)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images x. Scored in inference mode: what is kept then cannot be trained through later."""
        raise NotImplementedError(f"{type(self).__name__}.predict")

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)

    def compile_parts(self) -> None:
        """Compile what a step spends its time in, where a method says what that is; see `networks.compiled`."""

    def diagnose(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """Numbers worth a column in every record, from validation images of the training environments."""
        return {}

    def trained_state(self) -> dict[str, Tensor]:
        """What training changed: parameters that train, and buffers. The rest comes from the pretrained weights."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        trained |= {name for name, _ in self.named_buffers()}
        return {name: value.detach() for name, value in self.state_dict().items() if name in trained}

    def training_state(self) -> dict[str, Any]:
        """All that `update` changes, to go on from: trained weights, and the attributes that have a state of their own.

        Those are optimizers and their schedules. Override both methods where `update` changes anything else: only
        tensors and plain values, also in lists and dicts, can be loaded again.
        """
        states = {name: value.state_dict() for name, value in self._stateful().items()}
        return {"weights": self.trained_state(), "states": states}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of `training_state`, on an algorithm that was built alike."""
        self.load_state_dict(state["weights"], strict=False)
        for name, value in self._stateful().items():
            value.load_state_dict(state["states"][name])

    def _stateful(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if hasattr(value, "load_state_dict")}


def get_algorithm_class(name: str) -> type[Algorithm]:
    """The class registered as `name`; `UsageError` lists the known names."""
    algorithm: type[Algorithm] = load(ALGORITHMS, "algorithm", name)
    return algorithm


def join(minibatches: list[Minibatch]) -> Minibatch:
    """All environments' images and labels in one batch."""
    return torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])


def says_capturable(owner: object) -> bool:
    """`CAPTURABLE` as the class itself has it, its parents aside."""
    return bool(vars(type(owner)).get("CAPTURABLE"))


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms' statistics are afterwards what they were: for passes that are no step."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def logged(losses: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Metrics:
    """What `update` returns of its losses; floats in a stock DomainBed checkout, whose loop averages with NumPy."""
    stock = hparams["input_norm"] == "imagenet"
    return {name: loss.item() if stock else loss.detach() for name, loss in losses.items()}
