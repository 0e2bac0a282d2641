"""Short runs, and ways to stop them."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from domainbed_hp.algorithms import get_algorithm_class
from domainbed_hp.run_args import RunArgs
from domainbed_hp.training.loop import train

CPU = torch.device("cpu")
MINI = '{"clip_model": "mini", "clip_pretrained": "shapes", "batch_size": 4}'


@dataclass(frozen=True)
class Run:
    """A finished run that tests only read."""

    folder: Path

    def read(self) -> list[dict[str, Any]]:
        """Its records, anew for whoever changes them."""
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]


def go(folder: Path, **kwargs: Any) -> list[dict[str, Any]]:
    """A short run on Debug28; its records."""
    settings = {"dataset": "Debug28", "hparams": MINI, "steps": 4, "checkpoint_freq": 2, "seed": 3, "eval_images": 4}
    train(RunArgs(output_dir=str(folder), **settings | kwargs))
    return Run(folder).read()


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records:
        del record["step_time"], record["elapsed_s"], record["args"]["output_dir"]
    return records


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], object], algorithm: str = "LoRA") -> None:
    """Call `how` in the update of a step, once."""
    seen, update = [0], get_algorithm_class(algorithm).update

    def stopping(*args: Any) -> dict[str, float]:
        seen[0] += 1
        if seen[0] == step + 1:
            how()
        return update(*args)

    monkeypatch.setattr(get_algorithm_class(algorithm), "update", stopping)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("boom")
