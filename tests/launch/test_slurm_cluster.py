"""Jobs on a real Slurm: preempted, out of time, cancelled, on nodes that fail; and what becomes of the training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.launch.slurm import SlurmJob, render
from tests.launch import slurm_cluster
from tests.launch.jobs import ROOT, STEPS, Job
from tests.launch.slurm_cluster import NODES, THIS, Cluster
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(600),
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]

ENVIRONMENT = [
    f"export PATH={Path(sys.executable).parent}:{os.defpath}",
    f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo",
]
PATIENT = {"alive_timeout": 20.0}  # a heartbeat's, where daemons and launchers share few cores
QUICK = ("--output=/dev/null", "--wrap=sleep 1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster.serve() as running:
        yield running


@dataclass
class Submitted:
    """A job that Slurm has got."""

    cluster: Cluster
    folder: Path
    number: str

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("train-*.out")))

    @property
    def history(self) -> list[str]:
        """What the job has noted, without the time."""
        file = self.folder / f"train-{self.number}.history"
        return [line.split(" ", 1)[1] for line in file.read_text().splitlines()] if file.exists() else []

    def ended(self) -> dict[str, str]:
        return self.cluster.ended(self.number)


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Submitted]]:
    submitted = []

    def run(command: list[Any], folder: Path = tmp_path, **settings: Any) -> Submitted:
        settings = {"cpus_per_node": 2, "health_check": "", "env_setup": ENVIRONMENT, "nproc_per_node": 1, **settings}
        script = folder / "job.sbatch"
        script.write_text(render(SlurmJob(**settings), [str(word) for word in command]))
        submitted.append(cluster.call("sbatch", "--parsable", f"--chdir={folder}", script))
        return Submitted(cluster, folder, submitted[-1])

    yield run
    for number in submitted:
        cluster.call("scancel", number)
    until(lambda: not cluster.call("squeue", "--noheader"))


@pytest.fixture
def fit(submit: Callable[..., Submitted]) -> Callable[..., Submitted]:
    """Submits a training of two ranks on two nodes."""

    def run(made: Job, *more: str, **settings: Any) -> Submitted:
        return submit(["fit", "-c", made.run_file, *more], folder=made.folder, **{"nodes": 2, **settings})

    return run


def program(folder: Path, text: str) -> list[Any]:
    path = folder / "program.py"
    path.write_text(f"import os, sys\n{text}\n")
    return [path]


# -- interruptions --


def signal_the_batch_shell(job: Submitted) -> None:
    number = job.cluster.call("squeue", "--noheader", "--states=running", f"--jobs={job.number}", "--format=%A")
    # An element of an array gets it, but scancel says that the job is in transition, tries again, and finds no job.
    job.cluster.call("scancel", "--signal=USR1", "--batch", number, check=job.number == number)


def have_an_urgent_job_take_the_nodes(job: Submitted) -> None:
    job.cluster.call("sbatch", "--partition=urgent", "--exclusive", f"--nodes={len(NODES)}", *QUICK)


def wait_for_the_end_of_its_time(job: Submitted) -> None:
    """Slurm looks twice a minute, and so tells it in time."""


@pytest.mark.parametrize(
    ("interrupt", "pause", "settings"),
    [
        pytest.param(signal_the_batch_shell, 3, {}, id="USR1"),
        pytest.param(have_an_urgent_job_take_the_nodes, 5, {}, id="preempted"),
        pytest.param(wait_for_the_end_of_its_time, 70, {"time": "2", "signal_before": 75}, id="out of time"),
    ],
)
def test_a_job_that_is_interrupted_is_requeued_and_the_curve_is_the_undisturbed_one(
    job: Callable[..., Job],
    fit: Callable[..., Submitted],
    undisturbed: Callable[..., dict[int, float]],
    interrupt: Callable[[Submitted], None],
    pause: float,
    settings: dict[str, Any],
) -> None:
    expected = undisturbed()
    made = job(save_every=100, heartbeat=PATIENT, fault={"kind": "hang", "rank": 1, "step": 6, "seconds": pause})
    job_ = fit(made, **settings)
    until(lambda: made.events("hang"))
    interrupt(job_)
    end = job_.ended()
    # Slurm may tell a job up to a minute early that its time ends: before the pause, and then once more within it.
    assert end["JobState"] == "COMPLETED" and end["Restarts"] in ("1", "2" if "time" in settings else "1"), job_.said
    assert "stopped after step 7, saved" in job_.said
    assert [event["step"] for event in made.events("step") if event["rank"] == 0] == list(range(STEPS))
    assert made.curve() == expected


def test_a_job_that_is_killed_at_its_time_limit_goes_on_from_the_newest_checkpoint(
    job: Callable[..., Job], fit: Callable[..., Submitted], undisturbed: Callable[..., dict[int, float]]
) -> None:
    expected = undisturbed()
    made = job(heartbeat=PATIENT, fault={"kind": "hang", "rank": 1, "step": 6, "seconds": 600})
    job_ = fit(made, time="1", signal_before=1)
    end = job_.ended()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job_.said
    assert "DUE TO TIME LIMIT" in job_.said
    assert made.curve() == expected


def test_without_requeueing_the_next_element_of_the_array_goes_on(
    job: Callable[..., Job], fit: Callable[..., Submitted], undisturbed: Callable[..., dict[int, float]]
) -> None:
    expected = undisturbed()
    made = job(save_every=100, heartbeat=PATIENT, fault={"kind": "hang", "rank": 1, "step": 6, "seconds": 3})
    job_ = fit(made, restarts="array", max_requeues=2)
    until(lambda: made.events("hang"))
    signal_the_batch_shell(job_)
    third = made.folder / f"train-{job_.number}_3.out"
    until(lambda: third.exists() and "has ended the run, with 0" in third.read_text(), limit=120)
    assert [line for line in job_.history if "started" not in line] == ["run stopped: USR1", "job ended: 0"]
    assert made.curve() == expected


def test_a_job_that_is_cancelled_stays_so(job: Callable[..., Job], fit: Callable[..., Submitted]) -> None:
    made = job(heartbeat=PATIENT, fault={"kind": "hang", "rank": 1, "step": 6, "seconds": 3})
    job_ = fit(made)
    until(lambda: made.events("hang"))
    job_.cluster.call("scancel", job_.number)
    end = job_.ended()
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert "it was cancelled" in job_.said


# -- exit codes --


@pytest.mark.parametrize("code", [76, 93])
def test_a_run_that_would_end_the_same_way_again_is_not_requeued(
    submit: Callable[..., Submitted], tmp_path: Path, code: int
) -> None:
    job = submit(program(tmp_path, f"sys.exit({code})"), nodes=2)
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", f"{code}:0"), job.said
    assert job.history[-1] == f"job ended: {code}"


def test_requeues_have_an_end(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, "sys.exit(75)"), max_requeues=1)
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "1", "75:0"), job.said
    assert "as often as --max-requeues allows" in job.said


def test_so_have_failures_that_are_no_nodes_fault(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, "sys.exit(5)"), max_failures=2, max_restarts=0, node_failures=9)
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "1", "5:0"), job.said


# -- nodes --


def test_a_node_that_fails_the_health_check_is_excluded(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    check = f'[ "$SLURMD_NODENAME" != {THIS} ] || {{ echo "a fan is broken"; exit 1; }}'
    job = submit(program(tmp_path, ""), nodes=2, health_check=check)
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "1", THIS), job.said
    assert f"{THIS} does not pass the health check:\na fan is broken" in job.said
    assert job.history[0] == f"node {THIS} failed: health check"


def test_a_spare_node_takes_its_place_without_requeueing(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, ""), nodes=2, spare_nodes=1, health_check=f'[ "$SLURMD_NODENAME" != {THIS} ]')
    end = job.ended()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), job.said
    assert THIS not in job.history[1] and job.history[2] == "job ended: 0"


def test_a_health_check_that_no_node_passes_ends_the_job(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, ""), nodes=2, health_check="no-such-command")
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "1:0"), job.said
    assert "--health-check 'no-such-command' may be wrong itself" in job.said


def test_the_doctor_is_a_health_check(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, ""), health_check=SlurmJob().health_check)
    assert job.ended()["JobState"] == "COMPLETED", job.said


def test_a_node_that_fails_twice_is_excluded(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    job = submit(program(tmp_path, f"sys.exit(os.environ['SLURMD_NODENAME'] == {THIS!r})"), max_restarts=0)
    end = job.ended()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "2", THIS), job.said
    assert job.history.count(f"node {THIS} failed: exit code 1") == 2


def test_a_straggler_that_was_evicted_twice_is_excluded(job: Callable[..., Job], fit: Callable[..., Submitted]) -> None:
    made = job(heartbeat=PATIENT, save_every=100)
    stragglers = "--trainer.callbacks+=lightning_llm.callbacks.Stragglers"
    slow = "--trainer.callbacks+=tests.launch.slow_node.SlowNode"
    job_ = fit(
        made,
        *(stragglers, "--trainer.callbacks.every_n_steps=2", "--trainer.callbacks.evict=true"),
        *(slow, f"--trainer.callbacks.node={THIS}"),
    )
    end = job_.ended()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "2", THIS), job_.said
    assert job_.history.count(f"run stopped: exit code 75 for {THIS}") == 2


def test_a_spare_node_takes_the_place_of_one_that_is_lost(
    job: Callable[..., Job], fit: Callable[..., Submitted], undisturbed: Callable[..., dict[int, float]]
) -> None:
    expected = undisturbed()
    made = job(heartbeat=PATIENT, fault={"kind": "hang", "rank": 0, "step": 6, "seconds": 60})
    job_ = fit(made, spare_nodes=1)
    until(lambda: made.events("hang"))
    lost = job_.history[0].split(",")[-1]
    job_.cluster.call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    end = job_.ended()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), job_.said
    assert made.curve() == expected
