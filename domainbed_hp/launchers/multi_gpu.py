"""Jobs as child processes on the GPUs of this machine, each on one of them."""

import os
import shutil
import subprocess
import sys

from domainbed_hp.launchers.processes import Slot, at_least_one, environment, run_all
from domainbed_hp.registry import UsageError


def launch(commands: list[list[str]], jobs_per_gpu: int = 1) -> list[int]:
    """Run every command and return the exit codes, in the order of the commands; `jobs_per_gpu` at a time on a GPU.

    A child's CUDA_VISIBLE_DEVICES is one of the launcher's, or of all GPUs where that is not set.
    """
    at_least_one(jobs_per_gpu=jobs_per_gpu)
    if not commands:
        return []
    devices = (gpus() * jobs_per_gpu)[: len(commands)]  # one job on each before the second on any
    return run_all(commands, [Slot(environment(len(devices), CUDA_VISIBLE_DEVICES=device)) for device in devices])


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them: indices, UUIDs or the beginnings of UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = [str(index) for index in range(count())]
        why = "this machine has none that nvidia-smi or torch can see"
    else:
        found = []
        why = f"CUDA_VISIBLE_DEVICES={visible!r} hides them all"
        for device in visible.split(","):
            if not device.strip() or device.strip().startswith("-"):  # CUDA stops at the first that is none
                break
            found.append(device.strip())
    # DEVIATION: DomainBed waits forever.
    if not found:
        raise UsageError(f"the launcher multi_gpu needs a GPU, and {why}. On the CPU: --command_launcher local")
    return found


def count() -> int:
    """GPUs of this machine. Torch takes long to load: it is asked only where it must, in a process of its own."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True, text=True
    )
    return int(asked.stdout) if asked.returncode == 0 else 0
