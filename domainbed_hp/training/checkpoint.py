"""The checkpoint that a stopped run resumes from, and the signals that stop a run.

Batches, augmentation and dropout are functions of (seed, step). A checkpoint therefore holds no state of a generator or
a loader, but the step, the run's arguments, the algorithm's training state, the weight average, the unrecorded metrics,
the best accuracy and the elapsed time.
"""

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from domainbed_hp import records
from domainbed_hp.algorithms import Algorithm
from domainbed_hp.files import replace_atomically
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import find_differences
from domainbed_hp.run_dir import CHECKPOINT

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def save_checkpoint(run_dir: Path, algorithm: Algorithm, progress: dict[str, Any]) -> None:
    """Write `progress`, a dict of tensors and plain values, and the training state of the algorithm."""
    buffer = io.BytesIO()  # torch's own errors do not name the fault of a file system
    torch.save(progress | {"algorithm": algorithm.training_state()}, buffer)
    with replace_atomically(run_dir / CHECKPOINT) as path:
        path.write_bytes(buffer.getbuffer())


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of the checkpoint with tensors on the CPU, None if there is no checkpoint."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise UsageError(f"{path} cannot be read ({error}). Remove it: the run then starts anew.") from error
    return state


def find_checkpoint(run_dir: Path, args: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint of a run with these arguments, or None; `UsageError` if the folder holds another run."""
    # DEVIATION: DomainBed appends a second run to the records of the first.
    state, record = load_checkpoint(run_dir), next(records.read_records(run_dir), None)
    if (before := state or record) and (different := find_differences(before.get("args", {}), args)):
        listed = "; ".join(f"{name}: there {there!r}, here {here!r}" for name, (there, here) in different.items())
        raise UsageError(f"{run_dir} already holds another run ({listed}): choose another --output_dir or remove this")
    return state


class Stopped(Exception):
    """The run was asked to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """The first stop signal that arrived, if any; `check` raises `Stopped` for it.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Other later signals are ignored: batch systems send several.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal's number, 0 before one arrives."""
        self.immediate = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; registered with `signal.signal`."""
        if self.number:
            if number == self.number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if self.immediate:
            raise Stopped(number)

    def check(self) -> None:
        if self.number:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def raise_immediately(self) -> Iterator[None]:
        """Raise `Stopped` as soon as a signal arrives, in a context whose work may be left unfinished."""
        self.check()
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Catch SIGINT, SIGTERM and SIGUSR1, which batch systems send before they take a machine away."""
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():  # where alone Python allows handlers
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
