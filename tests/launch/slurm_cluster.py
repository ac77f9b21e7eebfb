"""A Slurm cluster of four nodes on this machine, from the distribution's packages, with keys, ports, files of its own.

On Debian: apt-get install --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
THIS = socket.gethostname().partition(".")[0]
NODES = (THIS, "n2", "n3", "n4")  # all of them are this machine; the first has its name too, and is the first choice

CONFIGURATION = """
ClusterName=test
SlurmctldHost={this}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
# A job that is requeued waits until its old credentials are void: 2 minutes by default, 5 seconds at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=10000,bf_interval=1
KillWait=5
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=usual Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"Slurm is not installed here: no {', '.join(absent)}"
    return None if os.geteuid() == 0 else "a cluster of our own is started by root alone"


@dataclass(frozen=True)
class Cluster:
    """Speaks to the controller.

    Attributes:
        environment: Of every process that does.
    """

    environment: dict[str, str]

    def call(self, *command: object, check: bool = True) -> str:
        """Runs a command of Slurm's, which must succeed unless that is not checked; returns what it says."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ExcNodeList, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, timeout: float = 240) -> dict[str, str]:
        """Waits until a job will not run again."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, f"job {number} goes on after {timeout} s: {job}"
            time.sleep(0.2)
        return job


@contextmanager
def serve() -> Iterator[Cluster]:
    """Starts the daemons; all of them are gone afterwards, and so are their jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
    try:
        _start_munge(folder / "munge")
        with _daemons(folder) as environment:
            yield Cluster(environment)
    finally:
        _stop(folder / "munge" / "pid")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _daemons(folder: Path) -> Iterator[dict[str, str]]:
    nodes = [
        f"NodeName={name} NodeHostname={THIS} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=1000 "
        f"Weight={1 if name == THIS else 2}"
        for name in NODES
    ]
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, this=THIS, controller_port=free_port(), nodes="\n".join(nodes))
    )
    (folder / "state").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment["SLURM_CONF"] = str(configuration)
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    try:
        subprocess.run(["slurmctld", "-c", "-i", "-f", configuration], **quiet)
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            subprocess.run(["slurmd", "-N", name, "-f", configuration], **quiet)
        cluster = Cluster(environment)
        deadline = time.monotonic() + 30
        while cluster.call("sinfo", "--noheader", "--partition=usual", "--format=%T %D") != f"idle {len(NODES)}":
            logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"the cluster does not come up:\n{logs}"
            time.sleep(0.1)
        yield environment
        cluster.call("scancel", "--user=root")
        deadline = time.monotonic() + 20
        while cluster.call("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for pid_file in (folder / "slurmctld.pid", *folder.glob("slurmd-*.pid")):
            _stop(pid_file)


def _start_munge(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.parent.chmod(0o755)
    for path in (folder, key):
        shutil.chown(path, "munge", "munge")
    places = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid", "log-file": folder / "log"}
    options = [f"--{name}={path}" for name, path in {**places, "seed-file": folder / "seed"}.items()]
    subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged"), *options], check=True)


def _stop(pid_file: Path) -> None:
    """Ends a daemon, and waits for that."""
    if not pid_file.is_file():
        return
    pid = int(pid_file.read_text())
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, signum)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return
