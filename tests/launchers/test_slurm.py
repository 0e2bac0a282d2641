"""The launcher slurm on a real cluster: one machine, on which munged, slurmctld and slurmd run as long as the tests."""

import contextlib
import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from domainbed_hp import run_dir
from domainbed_hp.launchers import slurm
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import EXIT_TAKEN, State

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
DAEMONS = ["munged", "slurmctld", "slurmd"]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
KillWait=15
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=3
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in [*DAEMONS, "sbatch", "squeue"] if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path has at most 107 characters
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=free_ports())
    )
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    conf = ["-D", "-f", str(folder / "slurm.conf")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        commands = [["munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *munge]]
        commands += [["slurmctld", *conf], ["slurmd", *conf]]
        daemons = []
        try:
            for command in commands:
                with open(folder / f"{command[0]}.out", "wb") as out:
                    daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
                if command[0] == "munged":
                    wait_for((folder / "munge.socket").exists, 10)
            wait_for(lambda: asked("sinfo", "--noheader", "--format=%T").strip() == "idle", 30)
            yield
        finally:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], capture_output=True)
            wait_for(lambda: not asked("squeue", "--noheader"), 30)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(20)
            shutil.rmtree(folder)


def free_ports() -> list[int]:
    """Two ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def job(folder: Path, code: str = "") -> list[str]:
    return [sys.executable, "-c", code, "--output_dir", str(folder)]


def running(count: int) -> list[str]:
    """Slurm's ids, when so many jobs run."""
    return wait_for(lambda: (ids := [i for i, s in slurm.read_states().items() if s == "RUNNING"])[count - 1 :] and ids)


SWEEP = """
output_dir = "sweep"
datasets = ["Debug28"]
rows = [{algorithm = "LoRA"}, {algorithm = "ZeroShotCLIP"}]
n_trials = 2
n_hparams = 1
single_test_envs = true
steps = 150
checkpoint_freq = 50
eval_images = 4
hparams = {clip_model = "mini", clip_pretrained = "shapes", LoRA = {batch_size = 2}}
"""


def test_a_sweep_is_done_whatever_the_cluster_does(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP)
    launch = [sys.executable, "-m", "domainbed_hp.scripts.sweep", "launch", "--config", "sweep.toml"]
    launch += ["--command_launcher", "slurm", "--slurm", "time=10", "comment=test", "--skip_confirmation"]

    first = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ids = running(3)
    folders = {name: Path("sweep", name) for name in slurm.find_queued(Path("sweep/slurm"))}
    assert len(folders) == 12
    of = {number: folders[name] for name, number in slurm.find_queued(Path("sweep/slurm")).items()}
    cancelled, requeued, preempted = (of[i] for i in ids[:3])
    for i in ids:
        wait_for(lambda i=i: (of[i] / "results.jsonl").exists())
    asked("scancel", ids[0])
    asked("scontrol", "requeue", ids[1])
    with contextlib.suppress(subprocess.TimeoutExpired):  # of an array's job it is told to try again, and would
        subprocess.run(["scancel", "--signal=USR2", ids[2]], timeout=3)  # what Slurm sends before the time is up
    _, error = first.communicate(timeout=170)
    assert first.returncode == 1, error
    assert f"stopped by SIGTERM, goes on when it is launched again: {cancelled}" in error
    states = {folder: run_dir.read_state(folder) for folder in folders.values()}
    assert states.pop(cancelled) is State.INCOMPLETE
    assert set(states.values()) == {State.DONE}

    second = subprocess.run(launch, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    for folder in folders.values():
        assert run_dir.read_state(folder) is State.DONE
        steps = [json.loads(line)["step"] for line in (folder / "results.jsonl").read_text().splitlines()]
        assert steps in ([0, 50, 100, 149], [0]), "every record once"
    for folder in (cancelled, requeued, preempted):
        assert "Resumed after step" in (folder / "out.txt").read_text(), "it did not begin anew"


def test_a_launcher_that_is_gone_leaves_the_jobs_and_the_next_one_waits_for_them(cluster: None, tmp_path: Path) -> None:
    code = "import pathlib, sys, time; time.sleep(5); (pathlib.Path(sys.argv[2]) / 'done').write_text('done')"
    commands = [job(tmp_path / str(i), code) for i in range(4)]
    launch = f"from domainbed_hp.launchers.slurm import launch; print(launch({commands!r}))"
    first = subprocess.Popen([sys.executable, "-c", launch], stderr=subprocess.PIPE, text=True)
    (master,) = {i.split("_")[0] for i in running(3)}
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=20)
    assert f"Slurm's jobs go on; `sweep status` shows their states. To end them: scancel {master}\n" in error
    assert "KeyboardInterrupt" in error
    assert slurm.launch(commands) == [0] * 4
    assert len((tmp_path / "slurm" / "jobs.txt").read_text().splitlines()) == 4, "nothing was submitted twice"


def test_exit_codes_come_back(cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "done").write_text("done")
    codes = {"good": "", "bad": "raise RuntimeError('the reason')", "killed": "import os; os.kill(os.getpid(), 9)"}
    codes |= {"taken": "import sys; sys.exit(75)", "before": "raise RuntimeError"}
    commands = [job(tmp_path / name, code) for name, code in codes.items()]
    assert slurm.launch(commands, max_parallel=2) == [0, 1, -9, EXIT_TAKEN, EXIT_TAKEN]
    lines = capfd.readouterr().err.splitlines()
    assert f"failed with exit code 1: {tmp_path / 'bad'}" in lines
    assert any(line.startswith("    RuntimeError: the reason (all of it: ") for line in lines)
    assert f"killed by SIGKILL: {tmp_path / 'killed'}" in lines
    assert not (tmp_path / "good" / "launch.log").exists()


def test_cancelled_jobs_are_codes(cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    commands = [job(tmp_path / str(i), "import time; time.sleep(600)") for i in range(4)]  # one more than there is room
    thread = threading.Thread(target=lambda: codes.extend(slurm.launch(commands)))
    thread.start()
    (master,) = {i.split("_")[0] for i in running(3)}
    asked("scancel", master)
    thread.join(timeout=60)
    assert all(code in (143, -15) for code in codes) and len(codes) == 4
    assert codes[3] == 143 and not (tmp_path / "3").exists()
    assert f"stopped by SIGTERM, goes on when it is launched again: {tmp_path / '3'}" in capfd.readouterr().err


def test_a_job_that_is_told_to_go_comes_back(cluster: None, tmp_path: Path) -> None:
    """SIGTERM of a job that Slurm does not end: pre-emption with a time of grace."""
    code = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
if (folder / "saved").exists(): sys.exit(0)
def save(number, frame):
    (folder / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(600)
"""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.extend(slurm.launch([job(tmp_path / "a", code)])))
    thread.start()
    (only,) = running(1)
    wait_for((tmp_path / "a" / "ready").exists)
    asked("scancel", "--signal=TERM", only)
    thread.join(timeout=90)
    assert codes == [0] and (tmp_path / "a" / "saved").exists()


def test_jobs_that_slurm_does_not_take_are_an_error(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Slurm refused the jobs: .*invalid partition"):
        slurm.launch([job(tmp_path / "a")], slurm={"partition": "nowhere"})
