"""Jobs as child processes on this machine, several at a time, the cores shared between them."""

from domainbed_hp.files import cpu_count
from domainbed_hp.launchers.processes import Slot, at_least_one, environment, run_all


def launch(commands: list[list[str]], max_parallel: int | None = None) -> list[int]:
    """Run every command and return the exit codes, in the order of the commands.

    `max_parallel` defaults to one job per core. A child gets OMP_NUM_THREADS = cores // parallel unless it is set.
    """
    at_least_one(max_parallel=max_parallel)
    parallel = max(1, min(max_parallel or cpu_count(), len(commands)))
    return run_all(commands, [Slot(environment(parallel)) for _ in range(parallel)])
