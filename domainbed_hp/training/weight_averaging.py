"""Weight averages over training, hparam `average` of every algorithm.

The averaged weights are scored and saved in place of the last ones. They never change the training.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, choice
from domainbed_hp.registry import WEIGHT_AVERAGES, UsageError, load


class RunningMean:
    """Running weighted mean of lists of tensors, in fp32 or better."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.tensors = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in like]
        self.total = 0.0
        """Sum of the weights so far."""

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], weight: float = 1.0) -> None:
        self.total += weight
        new = [t.detach().to(mean.dtype) for t, mean in zip(tensors, self.tensors, strict=True)]
        if new:
            torch._foreach_lerp_(self.tensors, new, weight / self.total)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_tensors(self.tensors, state["tensors"])
        self.total = state["total"]


class WeightAverage:
    """Base class: an average of the trainable `parameters`, built before the first of `steps` updates.

    Buffers are not averaged. A batch norm's statistics are those of the last weights.
    """

    # DEVIATION: of an adapter the factors A and B are averaged, not their product, which only merged weights could
    # hold. With WiSE, where B starts at 0, the update A B is therefore scaled by alpha and by how far A moved.
    HPARAMS: ClassVar[dict[str, HParam]] = {}
    VALIDATES: ClassVar[bool] = False
    """True: `add_validation_loss` is called at every record, which costs one more pass over the validation images."""

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        self.parameters, self.hparams, self.steps = list(parameters), hparams, steps

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """Raise `UsageError` for hparams that do not fit together."""

    def step(self) -> None:
        """Add the weights after an update."""

    def add_validation_loss(self, loss: float) -> None:
        """Add the validation loss of the current weights at a record: cross-entropy, mean over source domains."""

    def compute_weights(self) -> Sequence[Tensor]:
        """Return the averaged weights, in the order of the parameters, as if the run ended here."""
        raise NotImplementedError(f"{type(self).__name__}.compute_weights")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `step` and `add_validation_loss` change, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state in an average with the same arguments."""


class WeightedAverage(WeightAverage):
    """Running mean of the weights after every update t, each with weight `weigh(t)`; t = 0 is the start."""

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.t, self.mean = 0, RunningMean(self.parameters)
        self.mean.add(self.parameters, self.weigh(0))

    def weigh(self, t: int) -> float:
        """Return the weight of the weights after update t, up to a constant factor."""
        raise NotImplementedError(f"{type(self).__name__}.weigh")

    def step(self) -> None:
        self.t += 1
        self.mean.add(self.parameters, self.weigh(self.t))

    def compute_weights(self) -> Sequence[Tensor]:
        return self.mean.tensors

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        self.mean.load_state_dict(state["mean"])


class SimpleMovingAverage(WeightedAverage):
    """Mean of the weights from step t0 on; the current weights before t0.

    Arpit et al., "Ensemble of Averages: Improving Model Selection and Boosting Performance in Domain Generalization",
    NeurIPS 2022.
    """

    HPARAMS = {"average_start": HParam(100, help="sma: t0, number of updates before averaging starts", at_least=0)}

    def weigh(self, t: int) -> float:
        return 1.0

    def step(self) -> None:
        if self.t < self.hparams["average_start"]:
            self.mean.total = 0.0  # forgets all earlier weights
        super().step()


class BetaMovingAverage(WeightedAverage):
    """Mean of all weights, where those after update t of N have the density of Beta(b, b) at (t + 0.5) / (N + 1).

    With b = 0.5 the first and the last weights count most. Shu et al., "CLIPood: Generalizing CLIP to
    Out-of-Distributions", ICML 2023.
    """

    HPARAMS = {"average_beta": HParam(0.5, choice(0.25, 0.5, 1.0), "beta: b of the weights Beta(b, b)", at_least=0)}

    def weigh(self, t: int) -> float:
        x = (t + 0.5) / (self.steps + 1)
        return float((x * (1 - x)) ** (self.hparams["average_beta"] - 1))


class SWAD(WeightAverage):
    """Mean over the valley of the validation loss: all steps from where the loss stops falling to where it rises.

    The valley starts at the first of N_s successive records if its loss is the lowest of them. The threshold is their
    mean loss times 1 + r. The valley ends before the first N_e successive records with losses above the threshold. If
    the run ends earlier, the valley ends at the last record that is not above it. A record stands for all steps since
    the record before. Until a valley is found, the average is the mean since the last record.
    Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, Algorithm 1.
    """

    # DEVIATION: the released LossValley averages segments between records, with the same weight whatever their number
    # of steps; it adds up to three segments from before the valley, and some of them two times. Here, as in the paper,
    # every step of the valley counts once. Training goes on after the end of the valley, where the released code stops.
    # Records come every `checkpoint_freq` steps, 300 for most data sets; the paper has 100 (VLCS 50, DomainNet 500).
    HPARAMS = {
        "swad_converge": HParam(3, help="swad: N_s; a valley starts at the lowest loss of N_s records", at_least=1),
        "swad_tolerance": HParam(6, help="swad: N_e; a valley ends before N_e records above the threshold", at_least=1),
        "swad_ratio": HParam(0.3, help="swad: r; threshold (1 + r) x first losses; paper: 0.2 on VLCS", at_least=0),
    }
    VALIDATES = True

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        converge, tolerance = hparams["swad_converge"], hparams["swad_tolerance"]
        if tolerance < converge:
            raise UsageError(f"swad_tolerance: got {tolerance}, expected at least swad_converge, {converge}")

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.segment = RunningMean(self.parameters)
        """Mean of the weights since the last record."""
        self.recent: list[tuple[float, RunningMean]] = []
        """Losses and segments of the last N_s records, until the valley starts."""
        self.threshold: float | None = None
        self.valley, self.rise = RunningMean(self.parameters), RunningMean(self.parameters)
        self.above = 0
        """Number of successive records above the threshold; `rise` is the mean over their steps."""

    @property
    def ended(self) -> bool:
        return bool(self.above >= self.hparams["swad_tolerance"])

    def step(self) -> None:
        if not self.ended:
            self.segment.add(self.parameters)

    def add_validation_loss(self, loss: float) -> None:
        if self.ended:
            return
        segment, self.segment = self.segment, RunningMean(self.parameters)
        if self.threshold is not None:
            self._extend_valley(loss, segment)
            return
        needed = self.hparams["swad_converge"]
        self.recent = [*self.recent, (loss, segment)][-needed:]
        losses = [loss for loss, _ in self.recent]
        if len(losses) == needed and losses[0] == min(losses):
            self.threshold = sum(losses) / needed * (1 + self.hparams["swad_ratio"])
            for loss, segment in self.recent:
                self._extend_valley(loss, segment)
            self.recent = []

    def _extend_valley(self, loss: float, segment: RunningMean) -> None:
        """Add a segment to `rise`, and all of `rise` to the valley unless `loss` is above the threshold."""
        assert self.threshold is not None
        self.rise.add(segment.tensors, segment.total)
        if loss > self.threshold:
            self.above += 1
            return
        self.valley.add(self.rise.tensors, self.rise.total)
        self.rise, self.above = RunningMean(self.parameters), 0

    def compute_weights(self) -> Sequence[Tensor]:
        if self.threshold is not None:
            return self.valley.tensors
        return self.recent[-1][1].tensors if self.recent else self.parameters

    def state_dict(self) -> dict[str, Any]:
        means = {name: getattr(self, name).state_dict() for name in ("segment", "valley", "rise")}
        recent = [{"loss": loss, "mean": mean.state_dict()} for loss, mean in self.recent]
        return means | {"recent": recent, "threshold": self.threshold, "above": self.above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("segment", "valley", "rise"):
            getattr(self, name).load_state_dict(state[name])
        self.recent = [(record["loss"], RunningMean(self.parameters)) for record in state["recent"]]
        for (_, mean), record in zip(self.recent, state["recent"], strict=True):
            mean.load_state_dict(record["mean"])
        self.threshold, self.above = state["threshold"], state["above"]


class WiSE(WeightAverage):
    """Interpolation (1 - alpha) start + alpha current; `scripts.interpolate` computes it for a finished run.

    WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
    """

    HPARAMS = {"wise_alpha": HParam(0.5, choice(*(i / 10 for i in range(1, 10))), "0: start; 1: trained", at_least=0)}

    def __init__(self, parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int) -> None:
        super().__init__(parameters, hparams, steps)
        self.start = RunningMean(self.parameters)  # not in `state_dict`: the seed of a run determines its start
        self.start.add(self.parameters)

    def compute_weights(self) -> Sequence[Tensor]:
        return self.interpolate(self.hparams["wise_alpha"])

    def interpolate(self, alpha: float) -> list[Tensor]:
        ends = zip(self.start.tensors, self.parameters, strict=True)
        return [start.lerp(now.detach().to(start.dtype), alpha) for start, now in ends]


def make_weight_average(
    parameters: Sequence[nn.Parameter], hparams: dict[str, Any], steps: int
) -> WeightAverage | None:
    """Return the average that hparam `average` names, None for "none"."""
    if hparams["average"] == "none":
        return None
    average: WeightAverage = load(WEIGHT_AVERAGES, "average", hparams["average"])(parameters, hparams, steps)
    return average


@contextlib.contextmanager
def swap_weights(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters other values inside of the context, and restore them bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        copy_tensors(parameters, weights)
        yield
    finally:
        copy_tensors(parameters, before)


@torch.no_grad()
def copy_tensors(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors in place, which raises the version that caches depend on."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
