"""torch.compile of the parts of a training step."""

from types import MethodType
from typing import Any

import torch
from torch import nn

from domainbed_hp.networks.mmd import MMD
from domainbed_hp.networks.vit import Block


def compile_in_training(module: nn.Module, method: str) -> None:
    """Compile a module's method in training mode. Evaluation, whose batches have other shapes, is not compiled."""
    torch._dynamo.config.recompile_limit = 64  # layers differ in their ranks
    torch._functorch.config.donated_buffer = False  # an algorithm may go through a graph more than once
    plain = getattr(type(module), method)
    fast = torch.compile(plain, dynamic=False)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (fast if self.training else plain)(self, *args, **kwargs)

    setattr(module, method, MethodType(call, module))  # a bound method, so that a copy of the module gets its own


def compile_blocks(module: nn.Module) -> None:
    """Compile the transformer blocks and MMDs in `module`, where a step spends its time."""
    for part in module.modules():
        if isinstance(part, Block | MMD):
            compile_in_training(part, "forward")
