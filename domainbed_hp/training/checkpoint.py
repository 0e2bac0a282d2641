"""What a run needs to go on where it was stopped, and the signals that stop it.

Batches, augmentation and dropout are functions of (seed, step), so that weights, optimizers and the number of the step
are all there is to keep.
"""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from domainbed_hp.algorithms import Algorithm
from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import find_differences
from domainbed_hp.run_dir import CHECKPOINT

STOP = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def save(run_dir: Path, algorithm: Algorithm, progress: dict[str, Any]) -> None:
    """Write `progress`, plain values, and all that `update` changes."""
    buffer = io.BytesIO()  # torch's own writer does not say why it failed
    torch.save(progress | {"algorithm": algorithm.training_state()}, buffer)
    with replace_atomically(run_dir / CHECKPOINT) as path:
        path.write_bytes(buffer.getbuffer())


def load(run_dir: Path) -> dict[str, Any] | None:
    """What `save` wrote, on the CPU; None where there is nothing."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise all kinds
        raise UsageError(f"{path} cannot be read ({error}). Remove it: the run then starts anew.") from error
    return state


def check_same_run(run_dir: Path, before: dict[str, Any], args: dict[str, Any]) -> None:
    """`UsageError` unless these are the arguments of the run that `run_dir` holds, by its own `before`."""
    if different := find_differences(before, args):
        listed = "; ".join(f"{name}: there {there!r}, here {here!r}" for name, (there, here) in different.items())
        raise UsageError(f"{run_dir} already holds another run ({listed}): choose another --output_dir or remove it")


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Stopped(Exception):
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Notes the first signal, for `check`; where `at_once` is entered it raises `Stopped` there and then.

    A second Ctrl-C is a person in a hurry. Any other signal after the first is ignored: batch systems send several.
    """

    def __init__(self) -> None:
        self.number = 0
        self.now = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if number == self.number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if self.now:
            raise Stopped(number)

    def check(self) -> None:
        if self.number:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For what takes long and may be left half done."""
        self.check()
        self.now = True
        try:
            yield
        finally:
            self.now = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGUSR1 (which batch systems send before they take a machine away) as a `Stop`."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in STOP}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
