import os
import time
from pathlib import Path

from domainbed_hp import run_dir

LEASE = "filelock/2\npid={pid}\nhost={host}\nmode=lease\ntoken=a\nduration={duration!r}\n"
REMOTE_LEASE = LEASE.format(pid=12, host="node7", duration=run_dir.LEASE_S)


def leave_lease(folder: Path, host: str = "node7", pid: int = 12, age_s: float = 0) -> None:
    """The file of a holder on another host, who does not touch it."""
    folder.mkdir(exist_ok=True)
    text = LEASE.format(pid=pid, host=host, duration=run_dir.LEASE_S)
    (folder / "new").write_text(text)
    os.utime(folder / "new", (time.time() - age_s,) * 2)
    os.replace(folder / "new", folder / run_dir.LOCK)
