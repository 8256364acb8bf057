"""What the job scripts do around `sftdist`, on a real SLURM: words, exit codes, signals, requeues, containers. A small
program in place of `sftdist` notes its words and behaves as one of them says; test_slurm.py has the real one.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
STAND_IN = """\
#!/usr/bin/env bash
here="$HOME_OF_TEST/$SLURM_JOB_ID-$SLURM_NODEID-${SLURM_RESTART_COUNT:-0}"
printf '%s\\0' "$0" "$@" >"$here"
env -0 >"$here.env"
case "$*" in
*do-pipeline=2*) exit 2 ;;
"pipeline --plan "*)
    shift 2
    for stage in prepare train publish; do echo "$stage$(printf ' %q' "$@" "run.name=full-$SLURM_JOB_ID")"; done
    exit ;;
esac
do="$(printf '%s\\n' "$@" | sed -n "s/^do=//p;s/^do-$SLURM_NODEID=//p;s/^do-$1=//p" | tail -n 1)"
case "$do" in
stop) # a run that saves when it is told to stop
    trap 'sleep 1; touch "$here.saved"; echo saved; exit 75' USR1 TERM
    touch "$here.running"
    while :; do sleep 0.1; done ;;
deaf) touch "$here.running"; while :; do sleep 0.1; done ;; # not yet so far that it takes signals
once) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 75 ;;
*) exit "${do:-0}" ;;
esac
"""


class Desk:
    """Jobs with the stand-in on their PATH, as `sftdist` or under another name."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.put("sftdist")

    def put(self, name: str) -> None:
        program = self.programs / name
        program.write_text(STAND_IN)
        program.chmod(0o755)

    def submit(self, script: str, *words: str, nodes: int = 1, options: tuple[str, ...] = (), **variables: str) -> str:
        path = f"{self.programs}:{self.cluster.environment()['PATH']}"
        own = {"SFTDIST_VENV": "", "PATH": path, "HOME_OF_TEST": str(self.folder), **variables}
        return self.cluster.submit(script, *words, options=(f"--nodes={nodes}", *options), **own)

    def note(self, job: str, node: int = 0, start: int = 0) -> Path:
        return self.folder / f"{job}-{node}-{start}"

    def words(self, job: str, node: int = 0, start: int = 0) -> list[str]:
        """The words of the program on a node, without its own name."""
        return self.note(job, node, start).read_text().split("\0")[1:-1]

    def variables(self, job: str, node: int = 0, start: int = 0) -> dict[str, str]:
        text = self.note(job, node, start).with_suffix(".env").read_text()
        return dict(word.split("=", 1) for word in text.split("\0") if word)

    def until_running(self, job: str, start: int = 0) -> None:
        file = self.note(job, 0, start).with_suffix(".running")
        self.cluster.until(file.exists, 60, lambda: self.cluster.log(job))

    def saved(self, job: str, start: int = 0) -> bool:
        return self.note(job, 0, start).with_suffix(".saved").exists()


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Desk:
    return Desk(cluster, tmp_path)


def test_words_reach_every_node_as_they_were_given(desk: Desk) -> None:
    given = ["+exp=full", "run.note='a b, c'", 'run.name="x y"', "+data.mix={a:0.5,b:0.5}", "a=$HOME", "b=*", "c="]
    alone, both = desk.submit("train.sbatch", *given), desk.submit("evaluate.sbatch", *given, nodes=2)
    assert desk.cluster.end(alone) == ("COMPLETED", 0), desk.cluster.log(alone)
    assert desk.words(alone) == ["train", *given]
    assert desk.cluster.end(both) == ("COMPLETED", 0), desk.cluster.log(both)
    for node in (0, 1):
        words = desk.words(both, node)
        assert words[: len(given) + 1] == ["evaluate", *given]
        nodes, address, rank = words[len(given) + 1 :]
        assert (nodes, rank) == ("launch.nodes=2", f"launch.node_rank={node}")
        host, port = address.removeprefix("launch.address=").split(":")
        assert host == "127.0.0.1"
        assert 20000 <= int(port) < 32000


def test_the_scripts_are_found_in_any_folder(desk: Desk) -> None:
    """sbatch copies the script that it is given; a checkout or an installed package lies where it lies."""
    copy = desk.folder / "my slurm" / "slurm"
    shutil.copytree(ROOT / "slurm", copy)
    job = desk.submit(str(copy / "train.sbatch"), "a=/slurm/train.sbatch")
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    assert desk.variables(job)["SFTDIST_ROOT"] == str(copy.parent)


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (2, "FAILED"), (1, "FAILED")])
def test_the_exit_code_of_sftdist_is_the_one_of_the_job(desk: Desk, code: int, state: str) -> None:
    job = desk.submit("train.sbatch", f"do={code}")
    assert desk.cluster.end(job) == (state, code), desk.cluster.log(job)
    assert desk.cluster.job(job)["Restarts"] == "0"


def test_a_stop_before_the_time_limit_is_a_requeue(desk: Desk) -> None:
    """SLURM tells the batch shell alone, and starts the job again under its number; scancel is the end of it."""
    job = desk.submit("train.sbatch", "do=stop")
    desk.until_running(job)
    desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
    desk.cluster.start_now(job)
    assert desk.saved(job)
    desk.until_running(job, start=1)
    desk.cluster.run("scancel", job)
    assert desk.cluster.end(job)[0] == "CANCELLED"
    assert desk.saved(job, start=1)
    assert desk.cluster.job(job)["Restarts"] == "1", "not requeued, whatever the run has saved"
    log = desk.cluster.log(job)
    assert "stopped after a complete save and requeued" in log.partition("saved\n")[2], "the save was waited for"
    assert "start 2" in log, "one log for all starts"


def test_who_asks_for_a_requeue_gets_one_not_two(desk: Desk) -> None:
    job = desk.submit("train.sbatch", "do=stop", nodes=2)
    desk.until_running(job)
    desk.cluster.run("scontrol", "requeue", job)
    desk.cluster.start_now(job)
    assert desk.saved(job)
    desk.until_running(job, start=1)
    assert desk.cluster.job(job)["Restarts"] == "1"
    desk.cluster.run("scancel", job)
    desk.cluster.end(job)


def test_a_preempted_job_goes_on_when_the_other_has_ended(desk: Desk) -> None:
    """With a GraceTime SLURM sends TERM and counts the job as running until it ends or the time is over; a job that has
    saved and ended by then would be over for SLURM."""
    job = desk.submit("train.sbatch", "do=stop", nodes=2)
    desk.until_running(job)
    urgent = desk.submit("train.sbatch", "do=0", nodes=2, options=("--partition=urgent",))
    assert desk.cluster.end(urgent) == ("COMPLETED", 0)
    assert desk.saved(job)
    desk.cluster.start_now(job)
    desk.until_running(job, start=1)
    desk.cluster.run("scancel", job)
    desk.cluster.end(job)


@pytest.mark.long
def test_a_lost_node_is_a_requeue(desk: Desk) -> None:
    job = desk.submit("train.sbatch", "do=stop", nodes=2)
    desk.until_running(job)
    desk.cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    desk.cluster.until_state(job, "PENDING")
    desk.cluster.until(
        lambda: desk.cluster.run("sinfo", "--noheader", "--nodes=n2", "--format=%T").split()[0] == "idle"
    )
    desk.cluster.start_now(job)
    desk.until_running(job, start=1)
    desk.cluster.run("scancel", job)
    desk.cluster.end(job)


def test_a_stop_before_sftdist_takes_signals_is_a_requeue(desk: Desk) -> None:
    """Nothing is lost, and nothing has failed. The number of requeues has an end. The first signal is the one of a
    preemption with a GraceTime, to the steps alone."""
    job = desk.submit("train.sbatch", "do=deaf", SFTDIST_MAX_REQUEUES="1")
    desk.until_running(job)
    desk.cluster.run("scancel", "--signal=TERM", job)
    desk.cluster.start_now(job)
    desk.until_running(job, start=1)
    desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert desk.cluster.end(job) == ("FAILED", 75)
    assert "not requeued any more after 1 times (SFTDIST_MAX_REQUEUES)" in desk.cluster.log(job)


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(desk: Desk) -> None:
    job = desk.submit("train.sbatch", "do=75", options=("--no-requeue",))
    assert desk.cluster.end(job) == ("FAILED", 75)
    assert "submit the same line again with run.dir=" in desk.cluster.log(job)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_time_limit_itself(desk: Desk) -> None:
    """SLURM looks at the clock every 30 s."""
    job = desk.submit("train.sbatch", "do=stop", options=("--time=2", "--signal=B:USR1@60"))
    desk.until_running(job)
    desk.cluster.until(lambda: desk.cluster.job(job)["Restarts"] == "1", 200)
    assert desk.saved(job)
    desk.cluster.run("scancel", job)


@pytest.mark.long
def test_a_node_that_fails_ends_the_others(desk: Desk) -> None:
    job = desk.submit("train.sbatch", "do-0=deaf", "do-1=1", nodes=2)
    state, code = desk.cluster.end(job, 150)
    assert state == "FAILED"
    assert code != 0
    assert "Exited with exit code 1" in desk.cluster.log(job)


def test_the_tasks_of_an_array_are_the_jobs_of_a_sweep(desk: Desk) -> None:
    """Each is stopped, requeued and ended alone."""
    lists = desk.folder / "a sweep" / "jobs"
    lists.mkdir(parents=True)
    words = {0: ["+exp=full", "run.note='a\nb, c'", "do=0"], 2: ["do=3"], 3: ["do=once"]}
    for number, each in words.items():
        (lists / f"{number:05d}").write_text("".join(f"{word}\0" for word in each))
    job = desk.submit("sweep.sbatch", str(lists.parent), options=("--array=0-3",))
    tasks = [f"{job}_{number}" for number in range(4)]
    ends = [desk.cluster.end(task) for task in tasks[:3]]
    assert ends == [("COMPLETED", 0), ("FAILED", 2), ("FAILED", 3)], [desk.cluster.log(task) for task in tasks]
    assert "there is no such file" in desk.cluster.log(tasks[1])
    assert desk.words(desk.cluster.job(tasks[0])["JobId"]) == ["train", *words[0]]
    desk.cluster.start_now(tasks[3])
    assert desk.cluster.end(tasks[3]) == ("COMPLETED", 0), desk.cluster.log(tasks[3])
    assert [desk.cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "0", "1"]


def test_a_sweep_inside_of_one_job(desk: Desk) -> None:
    alone, both = (desk.submit("sweep.sbatch", "+exp=full", "seed=1,2", nodes=nodes) for nodes in (1, 2))
    assert desk.cluster.end(alone) == ("COMPLETED", 0)
    assert desk.words(alone) == ["train", "-m", "+exp=full", "seed=1,2"]
    assert desk.cluster.end(both) == ("FAILED", 2)
    assert "given 2 nodes, required 1" in desk.cluster.log(both)


def test_a_pipeline_is_a_chain_of_jobs(desk: Desk) -> None:
    """The stage behind one that is requeued waits for its end."""
    own = "--nodes=2 --comment=mine"
    given = ["+exp=full", "run.note='a  *'", "do-train=once"]
    job = desk.submit("pipeline.sbatch", *given, options=("--mem-per-cpu=100",), SFTDIST_TRAIN_OPTIONS=own)
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    prepare, train, publish = stages_of(desk, job)
    assert desk.cluster.end(prepare) == ("COMPLETED", 0)
    assert desk.words(prepare) == ["prepare", *given, f"run.name=full-{job}"]
    assert "SLURM_MEM_PER_CPU" not in desk.variables(prepare), "what SLURM tells the first job is not handed on"
    desk.cluster.start_now(train)
    assert desk.cluster.state(publish) == "PENDING"
    assert desk.cluster.end(train) == ("COMPLETED", 0)
    assert desk.cluster.job(train)["NumNodes"] == "2"
    assert desk.cluster.end(publish) == ("COMPLETED", 0)
    assert desk.words(publish)[0] == "publish"


def test_a_stage_that_fails_ends_the_pipeline(desk: Desk) -> None:
    job = desk.submit("pipeline.sbatch", "+exp=full", "do-train=3")
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    _, train, publish = stages_of(desk, job)
    assert desk.cluster.end(train) == ("FAILED", 3)
    assert desk.words(train) == ["train", "+exp=full", "do-train=3", f"run.name=full-{job}"]
    assert desk.cluster.end(publish)[0] == "CANCELLED"


def test_a_pipeline_that_may_not_begin_submits_nothing(desk: Desk) -> None:
    job = desk.submit("pipeline.sbatch", "+exp=full", "do-pipeline=2")
    assert desk.cluster.end(job) == ("FAILED", 2)
    assert stages_of(desk, job) == []


def stages_of(desk: Desk, job: str) -> list[str]:
    """The numbers of the stages' jobs, as the pipeline's log gives them."""
    return [line.split("job ")[1] for line in desk.cluster.log(job).splitlines() if ": job " in line]


def test_a_port_that_is_in_use_is_named(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        job = desk.submit("train.sbatch", "do=0", nodes=2, SFTDIST_PORT=port)
        assert desk.cluster.end(job) == ("FAILED", 2)
    assert f"SFTDIST_PORT: given {port}, which is in use on n1 (127.0.0.1)" in desk.cluster.log(job)
    job = desk.submit("train.sbatch", "do=0", nodes=2, SFTDIST_PORT=port)
    assert desk.cluster.end(job) == ("COMPLETED", 0)
    assert f"launch.address=127.0.0.1:{port}" in desk.words(job)


def test_what_a_site_sets_is_there_on_every_node(desk: Desk) -> None:
    site = desk.folder / "my site.sh"
    site.write_text('site_job() { export FROM_JOB="$undefined"here; }\n')  # modules do not know set -u
    job = desk.submit("train.sbatch", nodes=2, SFTDIST_SITE=str(site), options=("--export=ALL,TRITON_CACHE_DIR=/t",))
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    for node in (0, 1):
        found = desk.variables(job, node)
        assert found["FROM_JOB"] == "here"
        assert found["TRITON_CACHE_DIR"] == "/t"
        assert found["TORCH_EXTENSIONS_DIR"].endswith("sftdist-root/torch_extensions"), "the rest of site.sh holds"


def test_a_container_is_opened_by_apptainer_or_by_srun(desk: Desk) -> None:
    """Neither can be installed here: programs of their names note the line that they are given."""
    desk.put("apptainer")
    job = desk.submit("train.sbatch", "a=b c", SFTDIST_CONTAINER="/images/my image.sif", SFTDIST_MOUNTS="/data:/data")
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    here = desk.cluster.home
    mounts = f"{here},{ROOT},/data:/data"
    opened = ["exec", "--nv", "--bind", mounts, "--pwd", str(here), "/images/my image.sif"]
    assert desk.words(job) == [*opened, "sftdist", "train", "a=b c"]
    (desk.programs / "srun").write_text(STAND_IN.replace("$SLURM_NODEID", "0"))
    (desk.programs / "srun").chmod(0o755)
    job = desk.submit("train.sbatch", "a=b c", SFTDIST_CONTAINER="registry/sftdist:1", SFTDIST_MOUNTS="/data:/data")
    assert desk.cluster.end(job) == ("COMPLETED", 0), desk.cluster.log(job)
    words = desk.words(job)
    assert "--container-image=registry/sftdist:1" in words
    assert f"--container-workdir={here}" in words
    assert f"--container-mounts={here}:{here},{ROOT}:{ROOT},/data:/data" in words
    assert words[words.index("bash") :] == ["bash", str(ROOT / "slurm/node.sh"), "train", "a=b c"]


def test_a_job_without_sftdist_says_so(desk: Desk) -> None:
    nowhere = desk.submit("train.sbatch", SFTDIST_VENV="/nowhere")
    assert desk.cluster.end(nowhere) == ("FAILED", 2)
    assert "SFTDIST_VENV: given /nowhere, which is no virtual environment" in desk.cluster.log(nowhere)
    elsewhere = desk.folder / "checkout"  # without a .venv
    elsewhere.mkdir()
    (elsewhere / "slurm").symlink_to(ROOT / "slurm")
    none = desk.submit("train.sbatch", PATH="/usr/sbin:/usr/bin:/sbin:/bin", SFTDIST_ROOT=str(elsewhere))
    assert desk.cluster.end(none) == ("FAILED", 2)
    assert "finds no sftdist" in desk.cluster.log(none)
