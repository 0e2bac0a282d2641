"""Scores of an algorithm on splits, and the log of the metrics of its steps."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.base import Metrics
from domainbed_hp.datasets.loading.loader import EvalLoader
from domainbed_hp.networks.preprocess import Preprocess

EVAL_BATCH = {"cuda": 1024, "cpu": 64}
"""Batch size of scoring per device type. A CPU is no faster with batches that exceed its cache."""


@contextlib.contextmanager
def evaluation_mode(algorithm: Algorithm) -> Iterator[None]:
    """Put an algorithm in evaluation mode, and torch in inference mode."""
    algorithm.eval()
    with torch.inference_mode():
        yield
    algorithm.train()


class SplitScore(NamedTuple):
    """Accuracy and loss of an algorithm on one split."""

    accuracy: float
    """Fraction of correct predictions, in [0, 1]."""
    loss: float
    """Mean cross-entropy."""


def score_split(algorithm: Algorithm, loader: EvalLoader, device: torch.device, preprocess: Preprocess) -> SplitScore:
    """Score all images of a loader once; if a GPU runs out of memory, start again with half the batch size."""
    while True:
        try:
            sums = [torch.stack(sum_scores(algorithm, *batch.to(device, preprocess))).tolist() for batch in loader]
            return SplitScore(*(sum(column) / len(loader.indices) for column in zip(*sums, strict=True)))
        except torch.cuda.OutOfMemoryError:
            if loader.batch_size == 1:
                raise
        loader.batch_size //= 2  # outside the handler, whose traceback holds the memory


def sum_scores(algorithm: Algorithm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of correct predictions in a batch, and the sum of its cross-entropies.

    A single logit means class 1 above 0. Source: DomainBed's lib/misc.py.
    """
    logits = algorithm.predict(x).double()  # (B, C)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return (logits.argmax(1) == y).double().sum(), F.cross_entropy(logits, y.long(), reduction="sum")


def make_score_columns(scores: Mapping[str, SplitScore], train_envs: Sequence[int]) -> dict[str, float]:
    """Return accuracies and validation loss as keys and values of a record."""
    columns = {f"{name}_acc": score.accuracy for name, score in scores.items()}
    loss = compute_validation_loss(scores, train_envs)
    return columns if math.isnan(loss) else columns | {"val_loss": loss}


def compute_validation_loss(scores: Mapping[str, SplitScore], train_envs: Sequence[int]) -> float:
    """Mean loss on the `out` splits of the training environments, NaN if there are no such splits."""
    losses = [scores[f"env{i}_out"].loss for i in train_envs if f"env{i}_out" in scores]
    return sum(losses) / len(losses) if losses else math.nan


def compute_validation_accuracy(record: Mapping[str, Any], train_envs: Sequence[int]) -> float:
    """Mean accuracy on the `out` splits of the training environments, NaN if one of them has no images."""
    return float(np.mean([record.get(f"env{i}_out_acc", math.nan) for i in train_envs]))


class MetricLog:
    """The metrics of the steps since the last record, and the time that those steps took.

    Metrics stay on the device until `read` is called, so that a step never waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, list[float]] = defaultdict(list)
        self.unread: list[Metrics] = []
        self.restart_timer()

    def restart_timer(self) -> None:
        """Leave the time until now out of `step_time`."""
        self.timed_from = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of one step. Tensors are copied, since a later step may change them in place."""
        self.unread.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in metrics.items()})

    def read(self, step: int) -> None:
        """Convert the metrics of the unread steps, of which `step` is the last, to floats; set their mean `step_time`.

        `FloatingPointError` names the first step with a metric that is not finite.
        """
        if not self.unread:
            return
        floats = read_floats(self.unread, self.device)
        for t, metrics in enumerate(floats, start=step + 1 - len(floats)):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {t}: try a smaller lr, or --precision fp32")
                self.values[name].append(value)
        self.values["step_time"] += [(time.perf_counter() - self.timed_from) / len(floats)] * len(floats)
        self.restart_timer()
        self.unread.clear()

    def compute_means(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.values.items()}

    def clear(self) -> None:
        """Remove all metrics, after a record."""
        self.values.clear()
        self.restart_timer()


def read_floats(log: Sequence[Metrics], device: torch.device) -> list[dict[str, float]]:
    """Convert metrics to floats, with one transfer from the device for all of them."""
    tensors = [value for metrics in log for value in metrics.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack([t.to(device, torch.float64).squeeze() for t in tensors]).tolist() if tensors else ())
    return [{k: next(numbers) if isinstance(v, Tensor) else float(v) for k, v in metrics.items()} for metrics in log]
