"""Jobs as child processes on this machine, several at a time, the cores shared between them."""

from domainbed_hp.files import cpu_count
from domainbed_hp.launchers.processes import Slot, at_least_one, environment, run_all
from domainbed_hp.launchers.workers import WorkerSlot


def launch(commands: list[list[str]], max_parallel: int | None = None, jobs_per_process: int = 1) -> list[int]:
    """Run every command and return the exit codes, in the order of the commands.

    `max_parallel` defaults to one job per core. A child gets OMP_NUM_THREADS = cores // parallel unless it is set.
    `jobs_per_process` above 1: a process runs so many jobs, one after another, and keeps what it loaded.
    """
    at_least_one(max_parallel=max_parallel, jobs_per_process=jobs_per_process)
    parallel = max(1, min(max_parallel or cpu_count(), len(commands)))
    each = environment(parallel)
    slots = [WorkerSlot(each, jobs_per_process) if jobs_per_process > 1 else Slot(each) for _ in range(parallel)]
    return run_all(commands, slots)
