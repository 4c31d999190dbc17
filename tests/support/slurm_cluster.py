"""A real SLURM of two nodes on the loop-back of this machine, with all its files in one folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.support.clean_environment import clean_environment
from tests.support.daemons import end_daemons
from tests.support.ports import CHANCE, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
DEVICES = 4
CONFIGURATION = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu,npu
ReturnToService=2
# a job's number sets the port of its nodes, and other clusters of tests may run here
FirstJobId={first_job}
KillWait=10
# jobs start soon, as tests wait for them
SchedulerParameters=bf_interval=1
RebootProgram=/bin/true
# a small machine may claim to have more
SlurmdParameters=config_overrides
# sends the warning signal also when a job of a higher tier takes the nodes
# (PreemptParameters=send_user_signal in newer versions)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node}-{last}] CPUs=4 \\
  RealMemory=2000 Gres=gpu:{devices},npu:{devices}
PartitionName=low Nodes=ALL Default=YES OverSubscribe=NO PriorityTier=1 \\
  PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""
# SLURM counts devices that are character files; these open nothing
GENERIC_RESOURCES = """\
AutoDetect=off
NodeName=n[0-1] Name=gpu File={folder}/gpu[0-{last}]
NodeName=n[0-1] Name=npu File={folder}/npu[0-{last}]
"""


def missing_programs() -> str:
    """Return why such a cluster is impossible here, or an empty string."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return (
            f"{', '.join(absent)} missing: apt-get install --no-install-recommends slurm-wlm munge"
        )
    return "" if os.geteuid() == 0 else "slurmctld and slurmd need root"


def two_free_ports() -> int:
    """Return the first of two neighbouring free ports."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue


class SlurmCluster:
    """Nodes n0 and n1 with partitions ``low`` and ``high``, which evicts low.

    Args:
        folder: An empty directory with a short path, as a socket lies in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = clean_environment(SLURM_CONF=folder / "slurm.conf")
        for name in ("spool-n0", "spool-n1", "state"):
            (folder / name).mkdir()
        for name in ("gpu", "npu"):
            for number in range(DEVICES):
                subprocess.run(
                    ["mknod", str(folder / f"{name}{number}"), "c", "195", str(number)], check=True
                )
        node = two_free_ports()
        values = {
            "folder": folder,
            "host": socket.gethostname().split(".")[0],
            "controller": free_port(),
            "node": node,
            "last": node + 1,
            "devices": DEVICES,
            "first_job": CHANCE.randrange(1, 11000),
        }
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (folder / "gres.conf").write_text(GENERIC_RESOURCES.format(folder=folder, last=DEVICES - 1))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        run = self.folder
        subprocess.run(
            [
                "munged",
                "--force",
                f"--key-file={run}/munge.key",
                f"--socket={run}/munge.socket",
                f"--pid-file={run}/munged.pid",
                f"--log-file={run}/munged.log",
                f"--seed-file={run}/munged.seed",
            ],
            check=True,
            capture_output=True,
        )
        subprocess.run(["slurmctld", "-f", run / "slurm.conf"], check=True, env=self.environment)
        for node in ("n0", "n1"):
            subprocess.run(
                ["slurmd", "-f", run / "slurm.conf", "-N", node], check=True, env=self.environment
            )
        until = time.monotonic() + 60
        while set(self.command("sinfo", "-hN", "-p", "low", "-o", "%T", check=False).split()) != {
            "idle"
        }:
            assert time.monotonic() < until, (run / "slurmctld.log").read_text()
            time.sleep(0.2)

    def job_environment(self) -> dict[str, str]:
        """Return the environment for submitting a job, which inherits it."""
        return clean_environment(SLURM_CONF=self.folder / "slurm.conf")

    def command(self, *arguments: object, check: bool = True) -> str:
        """Return what a SLURM command printed."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env=self.environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert not check or done.returncode == 0, (
            f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, such as PENDING."""
        return self.fields(job)["JobState"]

    def fields(self, job: str) -> dict[str, str]:
        """Return the fields that ``scontrol show job`` prints."""
        output = self.command("scontrol", "show", "job", job, check=False)
        if not output:  # on a busy machine the first request may get no answer
            time.sleep(2)
            output = self.command("scontrol", "show", "job", job)
        return dict(word.split("=", 1) for word in output.split() if "=" in word)

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free."""
        jobs = self.command("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.command("scancel", *jobs, check=False)
            until = time.monotonic() + 40
            while self.command("squeue", "-h", check=False) and time.monotonic() < until:
                time.sleep(0.1)

    def stop(self) -> None:
        """Cancel every job and end the daemons."""
        self.cancel_all()
        end_daemons(
            self.folder / f"{name}.pid"
            for name in ("slurmd-n0", "slurmd-n1", "slurmctld", "munged")
        )
