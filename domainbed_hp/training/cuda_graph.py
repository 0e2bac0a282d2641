"""Faster training steps: kernels captured once and launched together, and compiled blocks. Argument `--compile`."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.base import Minibatch, restore_batch_norms
from domainbed_hp.registry import UsageError

COMPILE_STEPS = 5000
"""A run on a GPU with at least so many steps wins back the 20 seconds that compiling takes (`benchmarks/step.py`)."""


def speed_up(algorithm: Algorithm, device: torch.device, choice: str, steps: int) -> None:
    """Prepare an algorithm on `device` for `steps` updates.

    `auto`: on a GPU, steps that are all alike are captured, and compiled where the run is long enough. `on`: compiled
    in any case; `UsageError` where that cannot be. `off`: as written.
    """
    on_gpu = device.type == "cuda"
    if choice == "on" and not can_compile(device):
        needs = "Triton, a C compiler and Python's headers" if on_gpu else "a C++ compiler"
        raise UsageError(f"--compile on: torch.compile needs {needs} and finds none; pass --compile off")
    if choice == "on" or (choice == "auto" and on_gpu and steps >= COMPILE_STEPS and can_compile(device)):
        algorithm.compile_parts()
    if choice != "off" and on_gpu and algorithm.can_capture():
        algorithm.compute_gradients = Captured(algorithm)  # type: ignore[method-assign]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs."""
    if device.type == "cuda":  # Triton builds its launchers with the first of these that there is
        c = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists()
        return find_spec("triton") is not None and headers and any(map(shutil.which, c))
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


class Captured:
    """`algorithm.compute_gradients` as a CUDA graph: a step has a thousand kernels, and starting them one by one takes
    the host longer than running them takes the GPU. Anew for every new shape of the minibatches."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.function = algorithm, algorithm.compute_gradients
        self.shapes: list[Any] = []

    def __call__(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        device = minibatches[0][0].device
        shapes = [(x.shape, x.dtype, y.shape) for x, y in minibatches]
        with torch.cuda.device(device):
            if shapes != self.shapes:
                cast = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
                # Dropout stays a function of the step; a cast that is kept would not follow its weight.
                with torch.random.fork_rng([device]), torch.autocast("cuda", *cast, cache_enabled=False):
                    self.capture(minibatches)
                self.shapes = shapes
            for ours, theirs in zip(self.inputs, minibatches, strict=True):
                for to, value in zip(ours, theirs, strict=True):
                    to.copy_(value, non_blocking=True)
            self.graph.replay()
        for parameter, gradient in self.filled:
            parameter.grad = gradient
        return {name: loss.clone() for name, loss in self.losses.items()}  # the next replay writes over them

    def capture(self, minibatches: list[Minibatch]) -> None:
        self.inputs = [(x.clone(), y.clone()) for x, y in minibatches]
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        with restore_batch_norms(self.algorithm):
            side.wait_stream(now)
            with torch.cuda.stream(side):
                for _ in range(2):  # what is compiled, chosen or kept at the first call
                    self.function(self.inputs)
            now.wait_stream(side)
        self.algorithm.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Loaders go on meanwhile: their threads may do what this one must not.
            capture = torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local")
            with torch.cuda.stream(now), capture:  # a capture that fails does not put the stream back itself
                self.losses = self.function(self.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(self.algorithm).__name__
            raise UsageError(f"{name}: a step cannot be captured; pass --compile off ({error})") from error
        self.filled = [(p, p.grad) for p in self.algorithm.parameters() if p.grad is not None]
