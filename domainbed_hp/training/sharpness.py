"""Sharpness-aware minimization of any algorithm. Hparam `sharpness`.

SAM: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
DISAM: Zhang et al., "Domain-Inspired Sharpness-Aware Minimization Under Domain Shifts", ICLR 2024.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.base import Minibatch, restore_batch_norms
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.registry import SHARPNESS, load


class SAM:
    """Before an update, climb from the weights w to w + rho g / |g|; its step then starts from w again.

    g is the gradient of the mean of the source domains' cross-entropies. So the gradients of `update`, whatever its
    loss, are those at the climbed point. An algorithm that steps more than once in an update climbs for the first step.
    """

    # DEVIATION: SAM climbs the loss that it minimizes; this is cross-entropy of what `predict` says, for all, without
    # an algorithm's own terms (DPL's prompts are then per image).
    HPARAMS: ClassVar[dict[str, HParam]] = {
        "sam_rho": HParam(0.05, log_uniform(10, -2, -0.5), "sharpness: rho, length of the climb", at_least=0)
    }

    def __init__(self, algorithm: Algorithm, hparams: dict[str, Any]) -> None:
        self.algorithm, self.hparams = algorithm, hparams

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """`UsageError` for hparams that do not go together, before anything is built."""

    def objective(self, losses: Tensor) -> Tensor:
        """What is climbed, of the domains' losses (K,)."""
        return losses.mean()

    @contextlib.contextmanager
    def __call__(self, minibatches: list[Minibatch]) -> Iterator[None]:
        """Around `update`: climb, and return before the first step of an optimizer, or else at the end."""
        parameters = [p for p in self.algorithm.parameters() if p.requires_grad]
        own = [p.detach().clone() for p in parameters]

        def back(*_: Any) -> None:
            with torch.no_grad():
                for parameter, value in zip(parameters, own, strict=True):
                    parameter.copy_(value)
            own.clear()  # once
            parameters.clear()

        self.climb(minibatches, parameters)
        hook = register_optimizer_step_pre_hook(back)  # any optimizer: an algorithm may make them as it goes
        try:
            yield
        finally:
            hook.remove()
            back()

    def climb(self, minibatches: list[Minibatch], parameters: list[torch.nn.Parameter]) -> None:
        if not parameters:
            return
        with restore_batch_norms(self.algorithm):  # a batch norm counts the images of a step once
            losses = torch.stack([F.cross_entropy(self.algorithm.predict(x), y) for x, y in minibatches])
            if not losses.requires_grad:  # a text side that trains by a loss of its own
                return
            found = torch.autograd.grad(self.objective(losses), parameters, allow_unused=True)
        moves = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
        length = torch.stack([g.norm() for _, g in moves]).norm()
        with torch.no_grad():
            for parameter, gradient in moves:
                parameter.add_(gradient * (self.hparams["sam_rho"] / (length + 1e-12)))


class DISAM(SAM):
    """The climb leaves out what pulls the domains apart: of mean(L_i) - lambda Var(L_i), L_i the loss of domain i."""

    HPARAMS = SAM.HPARAMS | {
        "disam_weight": HParam(0.1, log_uniform(10, -2, 0), "disam: lambda, of the variance", at_least=0)
    }

    def objective(self, losses: Tensor) -> Tensor:
        spread: Tensor = self.hparams["disam_weight"] * losses.var(correction=0)
        return losses.mean() - spread


def find_climb(
    algorithm: Algorithm, hparams: dict[str, Any]
) -> Callable[[list[Minibatch]], contextlib.AbstractContextManager[Any]]:
    """What to put around every update, by hparam `sharpness`."""
    if hparams["sharpness"] == "none":
        return contextlib.nullcontext
    found: SAM = load(SHARPNESS, "sharpness", hparams["sharpness"])(algorithm, hparams)
    return found
