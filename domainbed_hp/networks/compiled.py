"""torch.compile for training alone."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from domainbed_hp.networks.vit import Block


def compile_in_training(module: nn.Module, method: str) -> None:
    """Compile a module's method as it runs in training; in evaluation, whose batches have other shapes, it stays."""
    torch._dynamo.config.recompile_limit = 64  # layers differ in their ranks, and jobs may share a process
    torch._functorch.config.donated_buffer = False  # an algorithm may go through a graph twice
    plain = getattr(type(module), method)
    fast = torch.compile(plain, dynamic=False)

    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (fast if self.training else plain)(self, *args, **kwargs)

    setattr(module, method, MethodType(either, module))  # a method: a copy of the module gets its own


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks of all CLIP towers in `module`, which is where their steps spend their time."""
    for each in module.modules():
        if isinstance(each, Block):
            compile_in_training(each, "forward")
