"""The contract of an algorithm: `__init__`, `update` and `predict`, as in DomainBed's algorithms.py."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import ALGORITHMS, load, refuse_renamed_methods

Minibatch = tuple[Tensor, Tensor]
"""(x, y) of one environment: x (B, 3, S, S) in [0, 1], not normalised; y (B,) int64."""

Metrics = Mapping[str, float | Tensor]
"""Named numbers that a step logs. A detached tensor of one number stays on its device until a record reads it."""

RENAMED_METHODS = {
    "hparams_for": "HPARAMS with HParam(..., by_dataset={...})",
    "pixels": "the class method preprocess(hparams, image_size)",
    "gradients": "compute_gradients(minibatches)",
}
"""Methods that an earlier version called -> their replacement."""


class Algorithm(nn.Module):
    """A domain generalization method. `num_domains` is the number of training environments.

    One that needs class names takes them as the keyword `class_names`, or reads `hparams["class_names"]`.
    """

    HPARAMS: ClassVar[dict[str, HParam]] = {
        "batch_size": HParam(32, lambda r: int(2 ** r.uniform(3, 5.5)), "images per environment", at_least=1)
    }
    CAPTURABLE: ClassVar[bool] = False
    """True if a GPU may record `compute_gradients` as a CUDA graph: every step does the same work, without a branch on
    a number, and changes nothing but gradients and batch norms. A subclass does not inherit it."""
    STEPS: ClassVar[int | None] = None
    """Number of steps that the method needs, whatever --steps says; 1 if it does not train. None: --steps decides."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.hparams = hparams

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_renamed_methods(cls, RENAMED_METHODS)

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """Raise `UsageError` for hparams that do not go together. Called before anything is built."""

    @classmethod
    def preprocess(cls, hparams: dict[str, Any], image_size: int) -> Preprocess:
        """Return the preprocessing of this method's images. `image_size` is the data set's."""
        return Preprocess(image_size)

    @classmethod
    def has_frozen_features(cls, hparams: dict[str, Any]) -> bool:
        """Return whether `encode(x)` never changes, so that `update` and `predict` take features in place of images."""
        return False

    @classmethod
    def describe_protocol(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        """Return the conditions of the method's numbers, as plain values for every record.

        `weights`: the weights at the start. `template`: the prompt of a class. `transductive`: a prediction needs a
        whole batch. `source_free`: it trains on no images. None for a condition that does not apply.
        """
        return {"weights": None, "template": None, "transductive": False, "source_free": False}

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Metrics:
        """Make one training step on one minibatch per training environment. Return numbers to log."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def compute_gradients(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """Set the gradients of one step and return detached numbers to log. A CUDA graph replays this method."""
        raise NotImplementedError(f"{type(self).__name__}.compute_gradients")

    def can_capture(self) -> bool:
        """Return whether a GPU may record `compute_gradients`, under these hparams."""
        return declares_capturable(self)

    def predict(self, x: Tensor) -> Tensor:
        """Return logits (B, C) of images x (B, 3, S, S). Scoring calls it in inference mode."""
        raise NotImplementedError(f"{type(self).__name__}.predict")

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)

    def compile_parts(self) -> None:
        """Compile the modules that take most of a step's time; see `networks.compiled`."""

    def diagnose(self, minibatches: list[Minibatch]) -> dict[str, Any]:
        """Return values for every record, from validation images of the training environments (there may be none)."""
        return {}

    def trained_state(self) -> dict[str, Tensor]:
        """Return the parameters that train and the buffers. All others are those of the pretrained weights."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        trained |= {name for name, _ in self.named_buffers()}
        return {name: value.detach() for name, value in self.state_dict().items() if name in trained}

    def training_state(self) -> dict[str, Any]:
        """Return everything that `update` changes: trained weights, and the state of optimizers and schedules.

        An algorithm that changes anything else overrides this method and `load_training_state`. Only tensors and plain
        values, also in lists and dicts, can be loaded again.
        """
        states = {name: value.state_dict() for name, value in self.find_stateful_attributes().items()}
        return {"weights": self.trained_state(), "states": states}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Load a `training_state` into an algorithm that was built with the same arguments."""
        self.load_state_dict(state["weights"], strict=False)
        for name, value in self.find_stateful_attributes().items():
            value.load_state_dict(state["states"][name])

    def find_stateful_attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if hasattr(value, "load_state_dict")}


def get_algorithm_class(name: str) -> type[Algorithm]:
    """Return the class registered as `name`. `UsageError` lists the known names."""
    algorithm: type[Algorithm] = load(ALGORITHMS, "algorithm", name)
    return algorithm


def declares_capturable(owner: object) -> bool:
    """Return `CAPTURABLE` of the object's own class; those of its parents do not count."""
    return bool(vars(type(owner)).get("CAPTURABLE"))


@contextlib.contextmanager
def restore_batch_norms(module: nn.Module) -> Iterator[None]:
    """Restore the statistics of all batch norms at the end, after passes that are not training steps."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def to_log(statistics: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Metrics:
    """Return detached statistics; as floats in a stock DomainBed checkout, whose loop averages with NumPy."""
    if hparams["input_norm"] != "imagenet":
        return {name: value.detach() for name, value in statistics.items()}
    return {name: value.item() for name, value in statistics.items()}
