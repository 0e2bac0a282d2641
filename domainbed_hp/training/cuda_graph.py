"""Faster training steps, flag `--compile`: CUDA graphs and compiled transformer blocks."""

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
"""Number of steps from which a run on a GPU regains the 20 s that compiling takes (`benchmarks/step.py`)."""


def speed_up_training(algorithm: Algorithm, device: torch.device, choice: str, steps: int) -> None:
    """Prepare an algorithm on `device` for `steps` fast updates; `choice` is the flag `--compile`.

    "auto": on a GPU, run steps as CUDA graphs if the algorithm allows it, and compile blocks if the run is long enough.
    "on": compile in any case, or raise `UsageError` if torch.compile lacks a tool. "off": neither.
    """
    on_gpu = device.type == "cuda"
    if choice == "on" and not can_compile(device):
        needs = "Triton, a C compiler and Python's headers" if on_gpu else "a C++ compiler"
        raise UsageError(f"--compile on: torch.compile needs {needs}, and some of it is missing. Pass --compile off")
    if choice == "on" or (choice == "auto" and on_gpu and steps >= COMPILE_STEPS and can_compile(device)):
        algorithm.compile_parts()
    if choice != "off" and on_gpu and algorithm.can_capture():
        algorithm.compute_gradients = CudaGraphStep(algorithm)  # type: ignore[method-assign]


def can_compile(device: torch.device) -> bool:
    """Return True if the tools that torch.compile needs are installed."""
    if device.type == "cuda":  # Triton builds its launchers with the first of these compilers that exists
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists()
        return find_spec("triton") is not None and headers and any(map(shutil.which, compilers))
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


class CudaGraphStep:
    """`algorithm.compute_gradients` as a CUDA graph, captured again whenever the shapes of the minibatches change.

    A step has about a thousand kernels. The CPU needs longer to start them one by one than the GPU to run them.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.function = algorithm, algorithm.compute_gradients
        self.shapes: list[Any] = []

    def __call__(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        device = minibatches[0][0].device
        shapes = [(x.shape, x.dtype, y.shape) for x, y in minibatches]
        with torch.cuda.device(device):
            if shapes != self.shapes:
                cast = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
                # The generator is restored so that dropout stays a function of the step. Autocast's cache is off
                # because a cast in the graph would not follow its weight.
                with torch.random.fork_rng([device]), torch.autocast("cuda", *cast, cache_enabled=False):
                    self._capture(minibatches)
                self.shapes = shapes
            for inputs, values in zip(self.inputs, minibatches, strict=True):
                for target, value in zip(inputs, values, strict=True):
                    target.copy_(value, non_blocking=True)
            self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return {name: value.clone() for name, value in self.statistics.items()}  # the next replay overwrites them

    def _capture(self, minibatches: list[Minibatch]) -> None:
        self.inputs = [(x.clone(), y.clone()) for x, y in minibatches]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        with restore_batch_norms(self.algorithm):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):  # first calls compile, choose kernels and fill caches
                    self.function(self.inputs)
            current.wait_stream(side)
        self.algorithm.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": the threads of the loaders go on, and may make calls that a capture forbids.
            capture = torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local")
            with torch.cuda.stream(current), capture:  # a capture that fails does not restore the stream itself
                self.statistics = self.function(self.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(self.algorithm).__name__
            raise UsageError(f"{name}: cannot capture a step as a CUDA graph ({error}). Pass --compile off") from error
        self.gradients = [(p, p.grad) for p in self.algorithm.parameters() if p.grad is not None]
