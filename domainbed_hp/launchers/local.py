"""The launcher `local`: jobs are processes on this machine, several at a time, which share its cores."""

from domainbed_hp.files import cpu_count
from domainbed_hp.launchers.processes import Slot, check_at_least_one, make_environment, run_all


def launch(commands: list[list[str]], max_parallel: int | None = None) -> list[int]:
    """Run every command, `max_parallel` at a time, and return the exit codes in the order of the commands.

    `max_parallel` defaults to one job per core. Every job gets OMP_NUM_THREADS = cores // parallel unless it is set.
    """
    check_at_least_one(max_parallel=max_parallel)
    parallel = max(1, min(max_parallel or cpu_count(), len(commands)))
    return run_all(commands, [Slot(make_environment(parallel)) for _ in range(parallel)])
