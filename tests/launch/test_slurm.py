"""The script of a Slurm job: what is in it, and what is refused. What it does is in test_slurm_cluster.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.errors import ConfigurationError
from lightning_llm.launch import commands
from lightning_llm.launch.slurm import SlurmJob, render

FIT = ("fit", "-c", "run.yaml")
DEPLOYED = Path(__file__).parents[2] / "deploy" / "slurm" / "train.sbatch"

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def run_settings(script: str, then: str) -> str:
    """What a shell says that has read the settings of a script and not the rest of it."""
    settings, _, _ = script.partition("# What follows")
    done = subprocess.run(
        ["bash", "-c", settings + then], capture_output=True, env={**os.environ, "SLURM_JOB_ID": "7"}, timeout=10
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout.decode()


@given(st.lists(words, min_size=1, max_size=6), words)
def test_any_words_reach_the_launcher_as_they_are(command: list[str], health_check: str) -> None:
    script = render(SlurmJob(health_check=health_check), command)
    said = run_settings(script, """printf '%s\\0' "${command[@]}" "$health_check" """)
    assert said.split("\0")[:-1] == [*command, health_check]


@given(st.sampled_from(["partition", "account", "output", "directive", "exclude", "job_name", "time"]), words)
def test_what_sbatch_could_misread_is_refused_and_all_else_is_one_line_of_its_own(option: str, text: str) -> None:
    value = [text] if option in ("directive", "exclude") else text
    plain = render(SlurmJob(), FIT).splitlines()
    try:
        lines = render(SlurmJob(**{option: value}), FIT).splitlines()
    except ConfigurationError:
        return
    assert all(line.startswith("#SBATCH --") and len(line.split()) == 2 for line in lines if "#SBATCH" in line)
    assert sum("#SBATCH" in line for line in lines) - sum("#SBATCH" in line for line in plain) in (0, 1)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({}, {"nodes=1", "ntasks-per-node=1", "exclusive", "mem=0"}),
        ({}, {"requeue", "open-mode=append", "signal=B:USR1@300"}),
        ({"nodes": 4, "spare_nodes": 1}, {"nodes=5", "no-kill"}),
        ({"cpus_per_node": 16, "gpus_per_node": 8}, {"cpus-per-task=16", "gpus-per-node=8"}),
        ({"restarts": "array", "max_requeues": 9}, {"array=1-10%1", "no-requeue", "output=%x-%A_%a.out"}),
        ({"directive": ["qos=high", "contiguous"], "exclude": ["n1", "n[3-4]"]}, {"qos=high", "contiguous"}),
        ({"exclude": ["n1", "n[3-4]"]}, {"exclude=n1,n[3-4]"}),
    ],
)
def test_options_become_directives(job: dict[str, object], expected: set[str]) -> None:
    lines = render(SlurmJob(**job), FIT).splitlines()
    directives = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert expected <= directives
    assert not ({"exclusive", "mem=0"} & directives and "cpus_per_node" in job)


def test_the_history_is_beside_the_output() -> None:
    script = render(SlurmJob(output="logs/%x-%j.out", job_name="big"), FIT)
    assert run_settings(script, 'echo "$history"') == "logs/big-7.history\n"


def test_the_environment_is_set_up_first() -> None:
    script = render(SlurmJob(env_setup=["export A='b c'", "B=$A-d"]), FIT)
    assert run_settings(script, 'echo "$B"') == "b c-d\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "job",
    [
        SlurmJob(),
        SlurmJob(nodes=8, spare_nodes=2, exclude=["n1"], env_setup=["source .venv/bin/activate"], output="logs/%j.out"),
        SlurmJob(restarts="array", health_check="", directive=["qos=high"]),
    ],
)
def test_shellcheck_finds_nothing(job: SlurmJob) -> None:
    script = render(job, [*FIT, "--data.path=my data's"])
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes=0"], "--nodes 0 must be at least 1"),
        (["--nproc-per-node=0"], "--nproc-per-node 0 must be at least 1"),
        (["--signal-before=70000"], "above Slurm's limit, 65535"),
        (["--time=tomorrow"], "--time 'tomorrow' must be minutes, H:M:S or D-H:M:S"),
        (["--job-name=my job"], "--job-name 'my job'"),
        (["--partition=a b"], "#SBATCH --partition=a b: ' ' cannot be written there"),
        (["--output=%j/out"], "Slurm makes no folders"),
        (["--directive=--qos=high"], "must be as behind sbatch --, such as qos=high"),
        (["--directive=nodes=3"], "nodes is written by other options"),
        (["--submit"], "either --print, for the script, or --submit"),
    ],
)
def test_wrong_options_are_refused_with_what_to_change(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        commands.main(["slurm", *arguments, "--print", "--", *FIT])


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="What shall the job run"):
        commands.main(["slurm", "--print"])


def test_unknown_options_and_words_before_the_dashes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--spares=1"], ["fit"], ["--restarts=never"]):
        with pytest.raises(SystemExit) as end:
            commands.main(["slurm", *arguments, "--print", "--", *FIT])
        assert end.value.code == 2
        assert "usage: lightning-llm launch slurm" in capsys.readouterr().err


def test_submitting_needs_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="There is no sbatch here"):
        commands.main(["slurm", "--submit", "--", *FIT])


def test_the_deployed_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    example = DEPLOYED.read_text()
    asked = ["--nodes=4", "--spare-nodes=1", "--nproc-per-node=8", "--gpus-per-node=8", "--time=1-00:00:00"]
    asked += ["--output=logs/%x-%j.out", "--env-setup=source .venv/bin/activate"]
    assert commands.main(["slurm", *asked, "--print", "--", *FIT]) == 0
    assert capsys.readouterr().out == example
