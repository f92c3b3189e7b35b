"""A SLURM cluster of two nodes on this machine, of the real daemons, for the time of the tests.

with slurm_cluster(folder) as environment:
    subprocess.run(["srun", "-N2", "-n2", "hostname"], env=environment)

It takes Debian's slurm-wlm and munge (`make slurm`) and root. Everything is in the folder, key and sockets too, and on
free ports, so that clusters stand side by side. The nodes are named 127.0.0.1 and 127.0.0.2: no name service is needed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")

# A requeued job starts again when its old credential has expired: after two minutes, were it not for cred_expire (s).
_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ReturnToService=2
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=60 State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster; None if nothing."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "sbatch", "munged") if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (make slurm)"
    return None if os.geteuid() == 0 else "slurmd starts jobs only as root"


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that use the cluster, which ends with the block. AssertionError if it does not
    start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    controller, first, second = _free_ports(3)
    conf = folder / "slurm.conf"
    cpus = max(1, len(os.sched_getaffinity(0)) // 2)
    conf.write_text(
        _CONF.format(
            host=socket.gethostname(), folder=folder, controller=controller, first=first, second=second, cpus=cpus
        )
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file")]
    daemons = [
        ("munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *munge),
        ("slurmctld", "-D", "-f", str(conf)),
        *(("slurmd", "-D", "-f", str(conf), "-N", node) for node in NODES),
    ]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    with ExitStack() as started:
        for number, (name, *options) in enumerate(daemons):
            log = started.enter_context((folder / f"{number}-{name}.log").open("wb"))
            command = [str(_find(name)), *options]
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            started.callback(_end, daemon)
            if name == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _idle(environment) == len(NODES), folder)
        started.callback(_cancel_all, environment, folder)
        yield environment


def _cancel_all(environment: dict[str, str], folder: Path) -> None:
    """Jobs of a test that failed would outlive the daemons."""
    subprocess.run(["scancel", "--me"], env=environment, capture_output=True, timeout=60, check=False)
    jobs = ["squeue", "--noheader"]
    _wait(lambda: not subprocess.run(jobs, env=environment, capture_output=True, timeout=60).stdout.strip(), folder)


def _idle(environment: dict[str, str]) -> int:
    """Nodes that wait for jobs."""
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout
    return int(said) if said.strip().isdecimal() else 0


def _wait(ready: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < deadline, f"the SLURM cluster did not come up, or end its jobs:\n{logs}"
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _find(name: str) -> str | None:
    """Where a daemon or command is; daemons are not on every user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_:
        probes = [open_.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
