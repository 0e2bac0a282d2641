"""Runs jobs one after another in one process, which keeps what they load; `launchers/workers.py` is the other side.

Reads jobs from stdin, a JSON object a line: `module`, which has a `main(argv) -> int`, its `argv`, and `log`, the file
that gets its stderr. Answers each on stdout with the exit code that a process of its own would have had.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from domainbed_hp import keep, registry
from domainbed_hp.scripts import run


def main() -> int:
    keep.start()
    jobs, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # they are the launcher's, not the jobs'
        os.dup2(nothing, stream)
    try:
        for line in jobs:
            job = json.loads(line)
            with stderr_to(job["log"], nothing):
                import_plugins(job["argv"])
                with as_found(), torch_as_found():
                    code = exit_code(job["module"], job["argv"])
            print(code, file=answers, flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # told to go, or the launcher went
        return 0
    return 0


@contextlib.contextmanager
def stderr_to(path: str, nothing: int) -> Iterator[None]:
    """Append to `path` what is written to stderr, also by code that is not Python."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted meanwhile
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(nothing, 2)


def exit_code(module: str, argv: Sequence[str]) -> int:
    """That of `python -m module argv`."""
    try:
        return run(importlib.import_module(module).main, argv)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def import_plugins(argv: Sequence[str]) -> None:
    """Import the job's `--import` modules: once in a process, so that what they set must be found by every job."""
    after = argv[argv.index("--import") + 1 :] if "--import" in argv else []
    for module in takewhile(lambda item: not item.startswith("--"), after):
        with contextlib.suppress(Exception, SystemExit):  # the job tells
            importlib.import_module(module)


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Put back what a job may change in its process, so that the next one finds it as new.

    Random generators are not among it: every run seeds them.
    """
    known = (registry.ALGORITHMS, registry.PROMPTS, registry.WEIGHT_AVERAGES, registry.SHARPNESS)
    tables = [*known, registry.DATASETS, registry.LAUNCHERS, os.environ]
    before = [dict(table) for table in tables]
    folder, path, streams = os.getcwd(), list(sys.path), (sys.stdout, sys.stderr)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        for table, content in zip(tables, before, strict=True):
            if dict(table) != content:
                table.clear()
                table.update(content)
        os.chdir(folder)
        sys.path[:], (sys.stdout, sys.stderr) = path, streams


def torch_settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """What gets and what sets each. Of those for TF32 the newer ones come last: the older ones change them."""
    import torch

    backends: Any = torch.backends
    cublas, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    newer = [backends, cublas, *(part for of in (cudnn, mkldnn) for part in (of, of.conv, of.rnn)), mkldnn.matmul]
    attributes = [(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")]
    attributes += [(cublas, f"allow_{kind}_reduced_precision_reduction") for kind in ("fp16", "bf16")]
    attributes += [(part, "fp32_precision") for part in newer]
    return [
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        *((partial(getattr, *each), partial(setattr, *each)) for each in attributes),
    ]


def asked(get: Callable[[], Any]) -> Any:
    """None where torch does not say: older and newer settings contradict each other."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return get()
        except RuntimeError:
            return None


@contextlib.contextmanager
def torch_as_found() -> Iterator[None]:
    """Put back torch's settings and free its memory."""
    settings = torch_settings()
    before = [asked(get) for get, _ in settings]
    try:
        yield
    finally:
        for (get, put), value in zip(settings, before, strict=True):
            if value is not None and asked(get) != value:
                put(value)
        gc.collect()
        cuda = sys.modules["torch"].cuda
        if cuda.is_initialized():
            cuda.empty_cache()
            for i in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(i)


if __name__ == "__main__":
    sys.exit(main())
