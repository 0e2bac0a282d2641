"""Sharpness-aware minimization of any algorithm, hparam `sharpness`.

SAM: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
DISAM: Zhang et al., "Domain-Inspired Sharpness-Aware Minimization Under Domain Shifts", ICLR 2024.
"""

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
    """Sharpness-aware minimization: gradients are taken at the weights w + rho g / |g|, and the step is made from w.

    g is the gradient of the cross-entropy, mean over source domains. The weights move back before the first
    optimizer step of an update; gradients that the update takes after it are those at w.
    """

    # DEVIATION: SAM perturbs by the loss that it minimizes. Here it is the cross-entropy of `predict` for every
    # algorithm, without the algorithm's own terms (DPL's prompts then differ between images).
    HPARAMS: ClassVar[dict[str, HParam]] = {
        "sam_rho": HParam(0.05, log_uniform(10, -2, -0.5), "rho: norm of the perturbation of the weights", at_least=0)
    }

    def __init__(self, algorithm: Algorithm, hparams: dict[str, Any]) -> None:
        self.algorithm, self.hparams = algorithm, hparams

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        """Raise `UsageError` for hparams that do not fit together."""

    def compute_objective(self, losses: Tensor) -> Tensor:
        """Return the scalar that the perturbation increases, from the losses of the domains (K,)."""
        return losses.mean()

    @contextlib.contextmanager
    def perturb(self, minibatches: list[Minibatch]) -> Iterator[None]:
        """Move the weights; restore them before the first step of any optimizer, at the latest at the end."""
        parameters = [p for p in self.algorithm.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]

        def restore(*_: Any) -> None:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            before.clear()  # later calls restore nothing
            parameters.clear()

        self._move(minibatches, parameters)
        hook = register_optimizer_step_pre_hook(restore)  # of all optimizers: an update may create one
        try:
            yield
        finally:
            hook.remove()
            restore()

    def _move(self, minibatches: list[Minibatch], parameters: list[torch.nn.Parameter]) -> None:
        if not parameters:
            return
        with restore_batch_norms(self.algorithm):  # a batch norm counts the images of a step once
            losses = torch.stack([F.cross_entropy(self.algorithm.predict(x), y) for x, y in minibatches])  # (K,)
            if not losses.requires_grad:  # nothing trains but a text side, by a loss of its own
                return
            gradients = torch.autograd.grad(self.compute_objective(losses), parameters, allow_unused=True)
        moves = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        length = torch.stack([g.norm() for _, g in moves]).norm()
        with torch.no_grad():
            for parameter, gradient in moves:
                parameter.add_(gradient * (self.hparams["sam_rho"] / (length + 1e-12)))


class DISAM(SAM):
    """SAM whose perturbation increases mean(L_i) - lambda Var(L_i), with L_i the loss of domain i."""

    HPARAMS = SAM.HPARAMS | {
        "disam_weight": HParam(0.1, log_uniform(10, -2, 0), "disam: lambda, weight of the losses' variance", at_least=0)
    }

    def compute_objective(self, losses: Tensor) -> Tensor:
        variance: Tensor = self.hparams["disam_weight"] * losses.var(correction=0)
        return losses.mean() - variance


def make_perturbation(
    algorithm: Algorithm, hparams: dict[str, Any]
) -> Callable[[list[Minibatch]], contextlib.AbstractContextManager[Any]]:
    """Return the context manager that hparam `sharpness` puts around every update."""
    if hparams["sharpness"] == "none":
        return contextlib.nullcontext
    sam: SAM = load(SHARPNESS, "sharpness", hparams["sharpness"])(algorithm, hparams)
    return sam.perturb
