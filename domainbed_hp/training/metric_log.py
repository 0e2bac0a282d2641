"""What steps log, on average over those since the last record."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from domainbed_hp.algorithms.base import Metrics


class Logged:
    """What was logged since the last record; on the device until it is `read`: the host runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, list[float]] = defaultdict(list)
        self.unread: list[Metrics] = []
        self.lap = time.perf_counter()

    def start(self) -> None:
        """The time of steps counts from here."""
        self.lap = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        # No graph stays, and no memory that a later step writes over: a method may log a parameter.
        self.unread.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in metrics.items()})

    def read(self, step: int) -> None:
        """Wait for what is unread, of steps up to `step`; the time since the last reading is theirs: `step_time`.

        Raises:
            FloatingPointError: a value is not finite; names the first step.
        """
        if not self.unread:
            return
        numbers = read_numbers(self.unread, self.device)
        for t, metrics in enumerate(numbers, start=step + 1 - len(numbers)):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {t}: try a smaller lr, or --precision fp32")
                self.values[name].append(value)
        now = time.perf_counter()
        self.values["step_time"] += [(now - self.lap) / len(numbers)] * len(numbers)
        self.lap = now
        self.unread.clear()

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.values.items()}

    def clear(self) -> None:
        """After a record."""
        self.values.clear()
        self.start()


def read_numbers(logged: Sequence[Metrics], device: torch.device) -> list[dict[str, float]]:
    """Plain floats, which a checkpoint can hold; all that lies on the device comes in one transfer."""
    tensors = [value for metrics in logged for value in metrics.values() if isinstance(value, Tensor)]
    found = iter(torch.stack([t.to(device, torch.float64).squeeze() for t in tensors]).tolist() if tensors else ())
    return [{k: next(found) if isinstance(v, Tensor) else float(v) for k, v in each.items()} for each in logged]
