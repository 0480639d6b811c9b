"""A real Slurm on this host: munged, slurmctld and two slurmd, which call themselves two nodes. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Nodes' names are addresses of the loopback network, so that they can be reached by name without /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in _DAEMONS if _program(name) is None]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


@dataclass
class SlurmCluster:
    """A running cluster; ``environment`` makes Slurm's commands talk to it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: int, *states: str, seconds: float = 180) -> str:
        """Until the job is in one of the states."""
        end = time.monotonic() + seconds
        while (state := self.state(number)) not in states:
            assert time.monotonic() < end, f"job {number} is {state}, not {states}\n{self.logs()}"
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The daemons' last words."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start the daemons with all their files in ``folder``, and stop them with whatever jobs are left."""
    folder.mkdir(parents=True, exist_ok=True)
    # munged insists on folders that nobody else can write, up to the root; pytest's are so, except /tmp itself.
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    key, sock = munge / "munge.key", munge / "socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    control, *ports = _free_ports(1 + len(NODES))
    config = folder / "slurm.conf"
    config.write_text(_config(folder, sock, control, ports))
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    environment = {**os.environ, "SLURM_CONF": str(config)}
    environment = {name: value for name, value in environment.items() if not name.startswith(("SLURM_JOB", "SBATCH_"))}
    cluster = SlurmCluster(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        log = (folder / f"{Path(words[0]).name}-{len(daemons)}.out.log").open("wb")
        program = _program(words[0])
        assert program is not None
        daemons.append(subprocess.Popen([program, *words[1:]], env=environment, stdout=log, stderr=log))
        log.close()

    try:
        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}", f"--pid-file={munge}/pid",
              f"--log-file={folder}/munged.log", f"--seed-file={munge}/seed", "--num-threads=2")  # fmt: skip
        _wait_until(sock.exists, daemons, cluster)
        start("slurmctld", "-D", "-c", "-f", str(config))
        for node in NODES:
            start("slurmd", "-D", "-N", node, "-f", str(config))
        _wait_until(lambda: _idle(environment), daemons, cluster)
        yield cluster
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--state=RUNNING"], env=environment, capture_output=True, timeout=20, check=False
            )
            subprocess.run(
                ["scancel", "--state=PENDING"], env=environment, capture_output=True, timeout=20, check=False
            )
            end = time.monotonic() + 15
            while time.monotonic() < end and _jobs(environment):
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(munge, ignore_errors=True)


def _config(folder: Path, sock: Path, control: int, ports: list[int]) -> str:
    host = socket.gethostname()
    cpus = os.cpu_count() or 1
    nodes = "\n".join(
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
        for node, port in zip(NODES, ports)
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sock}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=20
InactiveLimit=0
MinJobAge=3600
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def _idle(environment: dict[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and done.stdout.split() == ["idle"] * len(NODES)


def _jobs(environment: dict[str, str]) -> str:
    done = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _wait_until(true: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], cluster: SlurmCluster) -> None:
    end = time.monotonic() + 60
    while not true():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not ended and time.monotonic() < end, f"the cluster did not start; ended: {ended}\n{cluster.logs()}"
        time.sleep(0.2)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
