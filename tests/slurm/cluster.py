"""A real SLURM cluster of two nodes on this machine, made and taken down by the tests: its own munged, slurmctld and
two slurmd, with keys, sockets, ports and logs of their own. Whatever else runs on the machine is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import pytest

from tests.conftest import ROOT
from tests.e2e.workshop import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
CONF = """\
ClusterName=sftdist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
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
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """Context manager; skips the test, with the reason, where SLURM or root is missing. Jobs run in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._folder = Path()  # configuration, state and logs of the daemons
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if missing:
            pytest.skip(f"SLURM: {', '.join(missing)} not found (on Debian: apt-get install slurm-wlm munge)")
        if os.geteuid() != 0:
            pytest.skip("SLURM: only root can start a cluster with a munged of its own user")
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sftdist-slurm-")))
            munge = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sftdist-munge-")))
            self._start_munge(stack, munge)
            stack.callback(self._end_leftovers)
            self._start_slurm(stack, munge)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:  # whatever fails in between, the daemons go
            self.run("scancel", "--user=root")
            self.until(lambda: not self.run("squeue", "--noheader"), 90)

    def environment(self) -> dict[str, str]:
        """What a user of this cluster has set: no job of another cluster, this Python first on the path."""
        kept = {key: value for key, value in environment().items() if not key.startswith(("SLURM", "SBATCH"))}
        return {
            **kept,
            "SLURM_CONF": str(self._folder / "slurm.conf"),
            "SFTDIST_VENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{_path()}",
        }

    def run(self, *words: str, variables: Mapping[str, str] | None = None) -> str:
        """A command of SLURM in the home folder; what it prints."""
        done = subprocess.run(
            words, cwd=self.home, env={**self.environment(), **(variables or {})}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *words: str, options: Sequence[str] = (), **variables: str) -> str:
        """`sbatch OPTIONS slurm/SCRIPT WORDS`, or the script at a path; the job's number."""
        file = str(ROOT / "slurm" / script)
        return self.run("sbatch", "--parsable", *options, file, *words, variables=variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, Reason and so on."""
        text = self.run("scontrol", "show", "job", "--oneliner", job)
        words = [word.split("=", 1) for word in text.split() if "=" in word]
        return dict(reversed(words))  # the first of a name: the job's own words come later

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def log(self, job: str) -> str:
        """The job's file so far."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else ""

    def until(self, condition: Callable[[], bool], seconds: float = 180.0, why: Callable[[], str] = str) -> None:
        """Wait for something to become true; `why` is asked where it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s\n{why()}\n{self._words()}"
            time.sleep(0.2)

    def until_state(self, job: str, *states: str, seconds: float = 180.0) -> str:
        """Wait until a job is in one of the states; the one it is in. A job that is over is in no other any more."""

        def there() -> bool:
            state = self.state(job)
            assert state in states or state not in OVER, f"job {job} is {state}\n{self.log(job)}"
            return state in states

        self.until(there, seconds, lambda: f"{self.job(job)}\n{self.log(job)}")
        return self.state(job)

    def end(self, job: str, seconds: float = 180.0) -> tuple[str, int]:
        """Wait until a job is over; its state and exit code."""
        self.until_state(job, *OVER, seconds=seconds)
        found = self.job(job)
        return found["JobState"], int(found["ExitCode"].split(":")[0])

    def start_now(self, job: str) -> None:
        """Let a requeued job start without the two minutes that SLURM holds it.

        Not within the second in which its last start ended: its node takes the new one for that one, and fails it.
        """
        # A job that waits for another one is pending, too, before its first start.
        self.until(lambda: int(self.job(job)["Restarts"]) > 0, 180.0, lambda: f"{self.job(job)}\n{self.log(job)}")
        self.until_state(job, "PENDING")
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def _start_munge(self, stack: ExitStack, folder: Path) -> None:
        user = "munge" if _exists("munge") else "nobody"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        for path, mode in ((folder, 0o755), (key, 0o400)):
            shutil.chown(path, user)
            path.chmod(mode)
        names = ("key", "pid", "log", "seed")
        files = [f"--{name}-file={folder / name}" for name in names]
        self._daemon(stack, "munged", "--foreground", f"--socket={folder / 'socket'}", *files, user=user)
        self.until((folder / "socket").exists, 20)

    def _start_slurm(self, stack: ExitStack, munge: Path) -> None:
        host = socket.gethostname().split(".")[0]
        controller, first, second = _free_ports(3)
        text = CONF.format(
            folder=self._folder, munge=munge, host=host, controller=controller, first=first, second=second
        )
        (self._folder / "slurm.conf").write_text(text)
        (self._folder / "state").mkdir()
        self._daemon(stack, "slurmctld", "-D")
        for name in ("n1", "n2"):
            (self._folder / f"spool-{name}").mkdir()
            self._daemon(stack, "slurmd", "-D", "-N", name)
        self.until(self._idle, 60)

    def _idle(self) -> bool:
        try:
            return self.run("sinfo", "--noheader", "--partition=main", "--format=%T %D").split() == ["idle", "2"]
        except AssertionError:  # the controller does not listen yet
            return False

    def _daemon(self, stack: ExitStack, *command: str, user: str | None = None) -> None:
        """Started as our child, ended with us: by the end of the stack, or by the kernel where we are killed."""
        with (self._folder / f"{command[0]}.out").open("ab") as screen:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                user=user,
                extra_groups=[] if user else None,
                start_new_session=True,
            )
        stack.callback(_end, process)

    def _end_leftovers(self) -> None:
        """What the daemons have started and left behind has our SLURM_CONF in its environment, and nothing else has."""
        mark = f"SLURM_CONF={self._folder}/slurm.conf".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def _words(self) -> str:
        """The last lines of every daemon."""
        files = sorted([*self._folder.glob("*.log"), *self._folder.glob("*.out")])
        tails = ["\n".join(path.read_text(errors="replace").splitlines()[-12:]) for path in files]
        return "\n".join(f"{path.name}:\n{tail}" for path, tail in zip(files, tails, strict=True))


def _path() -> str:
    """The search path with the folders of daemons, which a user's often lacks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _exists(user: str) -> bool:
    return re.search(rf"^{user}:", Path("/etc/passwd").read_text(), re.MULTILINE) is not None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
