"""A real Slurm in a folder: munged, slurmctld and two slurmd, two nodes on one machine."""

import getpass
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.launching import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")

# Ports, users and folders of its own; jobs that are requeued start after cred_expire seconds.
CONFIGURATION = """\
ClusterName=emulated
SlurmctldHost={host}(localhost)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=0
KillWait=15
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
NODE = "CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 Gres=gpu:4"


def wait_for(condition, what, timeout):
    """Wait until a condition holds and return its value; the test fails after the timeout."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"no {what} after {timeout} s")


class EmulatedSlurm:
    """Starts the daemons in a folder, and stops them by their process ids."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **environment(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._daemons = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self._daemons:
            self.run("scancel", "--full", "--user", getpass.getuser(), check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self):
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        for i in range(4):
            (folder / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-3]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder,
                host=socket.gethostname(),
                ports=free_ports(3),
                user=getpass.getuser(),
                node=NODE,
            )
        )
        # --force: this folder is not as closed as a system's own, which munged complains of.
        options = [f"--{name}-file={folder}/munged.{name}" for name in ("log", "pid", "seed")]
        options += [f"--key-file={key}", f"--socket={folder}/munge.socket"]
        self._spawn("munged", "--foreground", "--force", *options)
        wait_for((folder / "munge.socket").exists, "munge socket", 20)
        self._spawn("slurmctld", "-D", "-f", folder / "slurm.conf")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node, "-f", folder / "slurm.conf")
        wait_for(lambda: self.node_states() == ["idle", "idle"], "idle nodes", 60)

    def _spawn(self, *command):
        with (self.folder / "daemons.err").open("a") as errors:
            self._daemons.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                )
            )

    def run(self, *command, check=True, **variables):
        """Run a command of Slurm and return what it printed."""
        result = subprocess.run(
            [str(word) for word in command],
            cwd=Path(__file__).resolve().parents[2],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def node_states(self):
        """Return the state of each node."""
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def submit(self, script, *arguments, options=(), **variables):
        """Submit a job from the repository root; its log lies in this folder. Returns the id."""
        log = self.folder / ("%A_%a.out" if script.endswith("seeds.sh") else "%j.out")
        options = ["--parsable", f"--output={log}", *options]
        return self.run("sbatch", *options, script, *arguments, **variables).strip()

    def show(self, job):
        """Return the fields of a job, as scontrol tells them."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job):
        """Return the state of a job."""
        return self.show(job)["JobState"]

    def log(self, job):
        """Return what a job printed so far."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait_for_state(self, job, *states, timeout=120):
        """Wait for one of some states of a job and return it."""
        return self._wait(job, lambda: (s := self.state(job)) in states and s, states, timeout)

    def wait_for_line(self, job, pattern, timeout=120):
        """Wait until a job's log has a line that matches."""
        self._wait(job, lambda: re.search(pattern, self.log(job)), pattern, timeout)

    def _wait(self, job, condition, what, timeout):
        """Wait; the test fails with the job's log after the timeout, or if the job failed."""

        def reached():
            failed = self.state(job) in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
            value = condition()
            assert value or not failed, f"no {what}, the job failed"
            return value

        try:
            return wait_for(reached, what, timeout)
        except AssertionError as error:
            state = {key: self.show(job)[key] for key in ("JobState", "Reason", "Restarts")}
            raise AssertionError(f"{error}: {state}\n{self.log(job)}") from None


def free_ports(count):
    """Return free ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
