"""Weights over time: what is scored and saved in place of the last weights, on top of any algorithm. Hparam `average`.

Training itself never sees them: it goes on from its own weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, choice
from domainbed_hp.registry import WEIGHT_AVERAGES, UsageError, load


class Mean:
    """Running weighted mean of lists of tensors, in fp32 or better."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.tensors = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in like]
        self.total = 0.0

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], weight: float = 1.0) -> None:
        self.total += weight
        new = [t.detach().to(mean.dtype) for t, mean in zip(tensors, self.tensors, strict=True)]
        if new:
            torch._foreach_lerp_(self.tensors, new, weight / self.total)

    def state(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "total": self.total}

    def load_state(self, state: dict[str, Any]) -> None:
        assign(self.tensors, state["tensors"])
        self.total = state["total"]


class Average:
    """Built from the parameters that train, at their start; `steps` is the number of updates to come.

    Buffers stay the current ones: a batch norm's statistics are those of the last weights.
    """

    # DEVIATION: of an adapter the factors A and B are averaged, not their product, which only merged weights could
    # hold; with WiSE, too, where B starts at 0: the update A B is then scaled by alpha and by how far A moved.
    HPARAMS: ClassVar[dict[str, HParam]] = {}
    VALIDATES: ClassVar[bool] = False
    """Asks for `validated`, which costs one more pass over the validation images at every record."""

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        self.parameters, self.hparams, self.steps = list(parameters), hparams, steps

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """`UsageError` for hparams that do not go together, before anything is built."""

    def step(self) -> None:
        """After each update."""

    def validated(self, loss: float) -> None:
        """At each record: the cross-entropy of the current weights on validation images, mean over source domains."""

    def weights(self) -> Sequence[Tensor]:
        """What to score, in the order of the parameters: what a run would return that ended here."""
        raise NotImplementedError(f"{type(self).__name__}.weights")

    def state(self) -> dict[str, Any]:
        """All that `step` and `validated` change, as tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, on an average that was built alike."""


class Weighted(Average):
    """Running mean of all weights, those after t updates counted `weight(t)` times; the start is t = 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.t, self.mean = 0, Mean(self.parameters)
        self.mean.add(self.parameters, self.weight(0))

    def weight(self, t: int) -> float:
        raise NotImplementedError(f"{type(self).__name__}.weight")

    def step(self) -> None:
        self.t += 1
        self.mean.add(self.parameters, self.weight(self.t))

    def weights(self) -> Sequence[Tensor]:
        return self.mean.tensors

    def state(self) -> dict[str, Any]:
        return {"t": self.t, "mean": self.mean.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        self.mean.load_state(state["mean"])


class SimpleMovingAverage(Weighted):
    """Mean of the weights from step t0 on; the current weights before that.

    Arpit et al., "Ensemble of Averages: Improving Model Selection and Boosting Performance in Domain Generalization",
    NeurIPS 2022.
    """

    HPARAMS = {"average_start": HParam(100, help="sma: updates before the mean starts, t0", at_least=0)}

    def weight(self, t: int) -> float:
        return 1.0

    def step(self) -> None:
        if self.t < self.hparams["average_start"]:
            self.mean.total = 0.0  # starts anew
        super().step()


class BetaMovingAverage(Weighted):
    """Mean of all weights, those after t of N updates weighted by the density of Beta(b, b) at (t + 0.5) / (N + 1).

    With b = 0.5 the first and the last weights count most. Shu et al., "CLIPood: Generalizing CLIP to
    Out-of-Distributions", ICML 2023.
    """

    HPARAMS = {"average_beta": HParam(0.5, choice(0.25, 0.5, 1.0), "beta: b of the density", at_least=0)}

    def weight(self, t: int) -> float:
        """Up to a factor, which a mean does not see."""
        x = (t + 0.5) / (self.steps + 1)
        return float((x * (1 - x)) ** (self.hparams["average_beta"] - 1))


class SWAD(Average):
    """Mean over the valley of the validation loss: all steps from where the loss stops falling to where it rises.

    The valley starts with the first of N_s successive records whose loss is the lowest of them; their mean loss times
    (1 + r) is the threshold. It ends before the first N_e successive records with losses above. Where a run ends
    earlier, with the last record that is not above. The steps since the record before belong to a record.
    Until there is a valley: the mean since the last record.
    Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, Algorithm 1.
    """

    # DEVIATION: the released LossValley averages segments between records, each counted once whatever its number of
    # steps; it adds up to three segments from before the valley, and some twice. Here, as in the paper, each step of
    # the valley counts once. Training goes on after the end of the valley, where the released code stops.
    # Records come every `checkpoint_freq` steps, 300 for most data sets; the paper has 100 (VLCS 50, DomainNet 500).
    HPARAMS = {
        "swad_converge": HParam(3, help="swad: records that make a valley, N_s", at_least=1),
        "swad_tolerance": HParam(6, help="swad: records above the threshold that end it, N_e", at_least=1),
        "swad_ratio": HParam(0.3, help="swad: tolerance ratio r; the paper has 0.2 on VLCS", at_least=0),
    }
    VALIDATES = True

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        converge, tolerance = hparams["swad_converge"], hparams["swad_tolerance"]
        if tolerance < converge:
            raise UsageError(f"swad_tolerance: got {tolerance}, expected at least swad_converge, {converge}")

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.segment = Mean(self.parameters)  # since the last record
        self.recent: list[tuple[float, Mean]] = []  # losses and segments of the last N_s records, until the valley
        self.threshold: float | None = None
        self.valley, self.rise = Mean(self.parameters), Mean(self.parameters)
        self.above = 0  # successive records above the threshold, whose steps are in `rise`

    @property
    def ended(self) -> bool:
        return bool(self.above >= self.hparams["swad_tolerance"])

    def step(self) -> None:
        if not self.ended:
            self.segment.add(self.parameters)

    def validated(self, loss: float) -> None:
        if self.ended:
            return
        segment, self.segment = self.segment, Mean(self.parameters)
        if self.threshold is not None:
            self.extend(loss, segment)
            return
        needed = self.hparams["swad_converge"]
        self.recent = [*self.recent, (loss, segment)][-needed:]
        losses = [loss for loss, _ in self.recent]
        if len(losses) == needed and losses[0] == min(losses):
            self.threshold = sum(losses) / needed * (1 + self.hparams["swad_ratio"])
            for each in self.recent:
                self.extend(*each)
            self.recent = []

    def extend(self, loss: float, segment: Mean) -> None:
        """Add a segment to the valley, or where its loss is above the threshold to what waits for one below."""
        assert self.threshold is not None
        self.rise.add(segment.tensors, segment.total)
        if loss > self.threshold:
            self.above += 1
            return
        self.valley.add(self.rise.tensors, self.rise.total)
        self.rise, self.above = Mean(self.parameters), 0

    def weights(self) -> Sequence[Tensor]:
        if self.threshold is not None:
            return self.valley.tensors
        return self.recent[-1][1].tensors if self.recent else self.parameters

    def state(self) -> dict[str, Any]:
        means = {name: getattr(self, name).state() for name in ("segment", "valley", "rise")}
        recent = [{"loss": loss, "mean": mean.state()} for loss, mean in self.recent]
        return means | {"recent": recent, "threshold": self.threshold, "above": self.above}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in ("segment", "valley", "rise"):
            getattr(self, name).load_state(state[name])
        self.recent = [(each["loss"], Mean(self.parameters)) for each in state["recent"]]
        for (_, mean), each in zip(self.recent, state["recent"], strict=True):
            mean.load_state(each["mean"])
        self.threshold, self.above = state["threshold"], state["above"]


class WiSE(Average):
    """(1 - alpha) start + alpha current.

    WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022. `scripts.interpolate` has every
    alpha of a finished run.
    """

    HPARAMS = {"wise_alpha": HParam(0.5, choice(*(i / 10 for i in range(1, 10))), "wise: alpha", at_least=0)}

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.start = Mean(self.parameters)  # the same after a resumption: a run starts as its seed says
        self.start.add(self.parameters)

    def weights(self) -> Sequence[Tensor]:
        return self.between(self.hparams["wise_alpha"])

    def between(self, alpha: float) -> list[Tensor]:
        ends = zip(self.start.tensors, self.parameters, strict=True)
        return [start.lerp(now.detach().to(start.dtype), alpha) for start, now in ends]


def find_average(parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> Average | None:
    """The average that hparam `average` names."""
    if hparams["average"] == "none":
        return None
    found: Average = load(WEIGHT_AVERAGES, "average", hparams["average"])(parameters, hparams, steps)
    return found


@contextlib.contextmanager
def holding(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> Iterator[None]:
    """The parameters hold other weights, and then their own again, bit for bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        assign(parameters, weights)
        yield
    finally:
        assign(parameters, own)


@torch.no_grad()
def assign(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copied in place, which what is cached of a parameter notices."""
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
