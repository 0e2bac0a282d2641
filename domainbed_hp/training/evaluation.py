"""How well an algorithm does on a split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.datasets.loading.loader import EvalLoader
from domainbed_hp.networks.preprocess import Preprocess

EVAL_BATCH = {"cuda": 1024, "cpu": 64}
"""Images scored at once, while they fit; a CPU is no faster beyond its cache."""


@contextlib.contextmanager
def evaluation(algorithm: Algorithm) -> Iterator[None]:
    """Evaluation mode, without gradients: what is made meanwhile can never be trained through."""
    algorithm.eval()
    with torch.inference_mode():
        yield
    algorithm.train()


class Score(NamedTuple):
    """Of one split."""

    accuracy: float
    """Share of right answers, in [0, 1]."""
    loss: float
    """Mean cross-entropy."""


def score(algorithm: Algorithm, loader: EvalLoader, device: torch.device, preprocess: Preprocess) -> Score:
    """One pass over a split; where a GPU runs out of memory, the next with half the batch.

    Source: DomainBed's lib/misc.py; a single logit says class 1 above 0.
    """
    while True:
        try:
            sums = [torch.stack(measure(algorithm, *batch.to(device, preprocess))).tolist() for batch in loader]
            return Score(*(sum(each) / len(loader.indices) for each in zip(*sums, strict=True)))
        except torch.cuda.OutOfMemoryError:
            if loader.batch_size == 1:
                raise
        loader.batch_size //= 2  # out of the handler, whose traceback holds the memory


def measure(algorithm: Algorithm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch: of right answers, and of cross-entropy."""
    logits = algorithm.predict(x).double()
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return (logits.argmax(1) == y).double().sum(), F.cross_entropy(logits, y.long(), reduction="sum")


def scored(scores: dict[str, Score], train_envs: list[int]) -> dict[str, float]:
    """The columns of a record."""
    columns = {f"{name}_acc": each.accuracy for name, each in scores.items()}
    loss = validation_loss(scores, train_envs)
    return columns if math.isnan(loss) else columns | {"val_loss": loss}


def validation_loss(scores: dict[str, Score], train_envs: list[int]) -> float:
    """Mean over the training environments of the cross-entropy on their `out` splits; NaN where there are none."""
    losses = [scores[f"env{i}_out"].loss for i in train_envs if f"env{i}_out" in scores]
    return sum(losses) / len(losses) if losses else math.nan
