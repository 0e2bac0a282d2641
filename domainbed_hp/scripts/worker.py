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
from collections.abc import Iterator, Sequence

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
            with stderr_to(job["log"], nothing), as_found():
                code = exit_code(job["module"], job["argv"])
            print(code, file=answers, flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # told to go, or the launcher went
        return 0
    return 0


@contextlib.contextmanager
def stderr_to(path: str, nothing: int) -> Iterator[None]:
    """Append to `path` what is written to stderr, also by code that is not Python."""
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


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Put back what a job may change in its process, so that the next one finds it as new.

    Random generators are not among it: every run seeds them.
    """
    tables = [registry.ALGORITHMS, registry.DATASETS, registry.LAUNCHERS, os.environ]
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
        tidy_torch()


def tidy_torch() -> None:
    """Torch's own settings as after its import, and its memory free; nothing where no job imported it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    threads = int(os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())).split(",")[0])
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
