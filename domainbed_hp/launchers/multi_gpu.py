"""The launcher `multi_gpu`: jobs are processes on this machine, every one with one of its GPUs."""

import os
import shutil
import subprocess
import sys

from domainbed_hp.launchers.processes import Slot, check_at_least_one, make_environment, run_all
from domainbed_hp.registry import UsageError


def launch(commands: list[list[str]], jobs_per_gpu: int = 1) -> list[int]:
    """Run every command, `jobs_per_gpu` at a time on each GPU, and return the exit codes in the order of the commands.

    A job's CUDA_VISIBLE_DEVICES is one entry of the launcher's, or the index of a GPU where that is not set.
    """
    check_at_least_one(jobs_per_gpu=jobs_per_gpu)
    if not commands:
        return []
    devices = (find_gpus() * jobs_per_gpu)[: len(commands)]  # every GPU gets one job before one gets two
    return run_all(commands, [Slot(make_environment(len(devices), CUDA_VISIBLE_DEVICES=device)) for device in devices])


def find_gpus() -> list[str]:
    """Return the usable GPUs as CUDA_VISIBLE_DEVICES names them: indices, UUIDs or beginnings of UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [str(index) for index in range(count_gpus())]
        why = "this machine has none that nvidia-smi or torch can see"
    else:
        devices = []
        why = f"CUDA_VISIBLE_DEVICES={visible!r} hides them all"
        for device in visible.split(","):
            if not device.strip() or device.strip().startswith("-"):  # CUDA ignores entries after an invalid one
                break
            devices.append(device.strip())
    # DEVIATION: DomainBed waits forever.
    if not devices:
        raise UsageError(f"the launcher multi_gpu needs a GPU, and {why}. Pass --command_launcher local")
    return devices


def count_gpus() -> int:
    """Return the number of GPUs of this machine, by nvidia-smi or by torch in another process, which is slower."""
    if shutil.which("nvidia-smi"):
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if result.returncode == 0:
            return sum(line.startswith("GPU ") for line in result.stdout.splitlines())
    code = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else 0
