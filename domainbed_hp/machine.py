"""The machine that a process runs on."""

import os


def cores() -> int:
    """Cores that this process may use, also where a cluster only says so."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, int(os.environ.get("SLURM_CPUS_ON_NODE", found)))
