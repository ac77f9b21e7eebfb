"""`lightning-llm launch slurm`: writes the script of a Slurm job that starts a launcher on each node, and submits it.

The script is the job's header and settings, from here, and slurm_job.sh, the same for every job. It has no part in the
training: it hands signals on, and asks Slurm to start the job again where the launchers' exit code says so.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Literal

from lightning_llm.arguments import parse_arguments
from lightning_llm.errors import ConfigurationError

LONGEST_WARNING = 65535  # seconds; Slurm's own limit

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_JOB_NAME = re.compile(r"[\w.+-]+", re.ASCII)
_DIRECTIVE = re.compile(r"[a-z][a-z-]*(=.+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job of one launcher per node.

    Args:
        nodes: That the run needs.
        spare_nodes: More to hold: one of them takes the place of a node that fails, without waiting in the queue.
        nproc_per_node: Ranks on each node; auto is one per GPU.
        gpus_per_node: To ask Slurm for.
        cpus_per_node: To ask Slurm for; by default all of the node, which nobody shares then.
        partition: Of the cluster.
        account: That the time is taken from.
        time: Limit of one run of the job: minutes, H:M:S or D-H:M:S. Shorter ones start sooner.
        job_name: Also in the names of its files.
        output: The job's output, with Slurm's patterns in the file's name; by default %x-%j.out, %x-%A_%a.out in an
            array.
        exclude: Nodes not to use.
        directive: More for sbatch, such as qos=high or constraint=h100.
        signal_before: Seconds before the end of its time that the run is told to save and stop.
        restarts: Ask Slurm to requeue the job; or, where that is not allowed, be an array of jobs that go on after each
            other.
        max_requeues: So often at most the job is started again.
        max_restarts: Of ranks by their launcher, within an hour, without the job being started again.
        max_failures: Runs in a row that fail, rather than being told to stop, after which the job ends.
        node_failures: A node that was to blame so often is excluded.
        health_check: A command for each node before the start; nodes that fail it are excluded. '' for none.
        env_setup: Shell lines that come first, such as 'source venv/bin/activate'.

    Raises:
        ConfigurationError: What Slurm would not understand, or misunderstand.
    """

    nodes: int = 1
    spare_nodes: int = 0
    nproc_per_node: int | Literal["auto"] = "auto"
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    job_name: str = "train"
    output: str | None = None
    exclude: list[str] | None = None
    directive: list[str] | None = None
    signal_before: int = 300
    restarts: Literal["requeue", "array"] = "requeue"
    max_requeues: int = 20
    max_restarts: int = 10
    max_failures: int = 3
    node_failures: int = 2
    health_check: str = "lightning-llm doctor"
    env_setup: list[str] | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ConfigurationError(f"{_option(name)} {value} must be at least {least}.")
        if self.signal_before > LONGEST_WARNING:
            raise ConfigurationError(f"--signal-before {self.signal_before} is above Slurm's limit, {LONGEST_WARNING}.")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigurationError(f"--time {self.time!r} must be minutes, H:M:S or D-H:M:S, such as 1-12:00:00.")
        if not _JOB_NAME.fullmatch(self.job_name):
            raise ConfigurationError(f"--job-name {self.job_name!r}: use letters, digits and _ . + - alone.")
        for text in self.directive or ():
            if not _DIRECTIVE.fullmatch(text):
                raise ConfigurationError(f"--directive {text!r} must be as behind sbatch --, such as qos=high.")
            name = text.partition("=")[0]
            if name in _OURS:
                raise ConfigurationError(f"--directive {text!r}: {name} is written by other options, see --help.")
        folder = PurePosixPath(self.output_pattern).parent
        if "%" in str(folder):
            raise ConfigurationError(
                f"--output {self.output}: Slurm makes no folders. Use its patterns in the file's name alone."
            )
        for line in self.directives():
            _refuse_what_sbatch_misreads(line)

    @property
    def output_pattern(self) -> str:
        """The file of the output, in Slurm's words."""
        return self.output or ("%x-%A_%a.out" if self.restarts == "array" else "%x-%j.out")

    def directives(self) -> list[str]:
        """Of sbatch, as on its command line without the --."""
        wanted: list[tuple[str, object]] = [
            ("job-name", self.job_name),
            ("partition", self.partition),
            ("account", self.account),
            ("time", self.time),
            ("nodes", self.nodes + self.spare_nodes),
            ("ntasks-per-node", 1),
            ("gpus-per-node", self.gpus_per_node),
            ("cpus-per-task", self.cpus_per_node),
            ("exclude", ",".join(self.exclude) if self.exclude else None),
            ("output", self.output_pattern),
            ("signal", f"B:USR1@{self.signal_before}"),
            ("array", f"1-{self.max_requeues + 1}%1" if self.restarts == "array" else None),
        ]
        flags = [
            "exclusive" if self.cpus_per_node is None else None,
            "mem=0" if self.cpus_per_node is None else None,
            "open-mode=append",
            "requeue" if self.restarts == "requeue" else "no-requeue",
            "no-kill" if self.spare_nodes else None,
            *(self.directive or ()),
        ]
        return [f"{name}={value}" for name, value in wanted if value is not None] + [flag for flag in flags if flag]


_LEAST = {
    "nodes": 1,
    "spare_nodes": 0,
    "nproc_per_node": 1,
    "gpus_per_node": 1,
    "cpus_per_node": 1,
    "signal_before": 1,
    "max_requeues": 0,
    "max_restarts": 0,
    "max_failures": 1,
    "node_failures": 1,
}

# Directives that options decide; a second one would take their place without a word.
_OURS = {
    *("job-name", "partition", "account", "time", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "exclude"),
    *("cpus-per-task", "output", "error", "signal", "array", "open-mode", "requeue", "no-requeue", "no-kill"),
}


def render(job: SlurmJob, command: Sequence[str]) -> str:
    """The script.

    Args:
        job: See there.
        command: Of `lightning-llm`, with its arguments, that the launchers run: fit -c run.yaml.

    Raises:
        ConfigurationError: No command, or a word that no shell can hand on.
    """
    if not command:
        raise ConfigurationError("What shall the job run? Give it behind `--`: ... --print -- fit -c run.yaml")
    for text in (*command, *(job.env_setup or ()), job.health_check):
        if "\0" in text:
            raise ConfigurationError(f"{text!r} has a NUL character, which no program can be given.")
    folder = PurePosixPath(job.output_pattern).parent
    # The id is left to the shell; all elements of an array share a file.
    history = shlex.quote(str(folder / job.job_name)) + '-"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}".history'
    settings = {
        "command": _array(command),
        "nodes": job.nodes,
        "nproc_per_node": job.nproc_per_node,
        "max_restarts": job.max_restarts,
        "signal_before": job.signal_before,
        "restarts": job.restarts,
        "max_requeues": job.max_requeues,
        "max_failures": job.max_failures,
        "node_failures": job.node_failures,
        "health_check": shlex.quote(job.health_check),
        "exclude": _array(job.exclude or ()),
        "history": history,
    }
    setup = []
    for line in job.env_setup or ():
        # What it reads is on the cluster, not where shellcheck is.
        setup += ["# shellcheck disable=SC1090,SC1091", line]
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `lightning-llm launch slurm`, which tells what can be set. To submit: sbatch THIS_FILE",
            *(f"#SBATCH --{line}" for line in job.directives()),
            "",
            *(["# Before `set -u`: such files are not written for it.", *setup, ""] if setup else []),
            *(f"{name}={value}" for name, value in settings.items()),
            "",
            (files("lightning_llm.launch") / "slurm_job.sh").read_text(encoding="utf-8"),
        ]
    )


def submit(script: str) -> str:
    """Gives a script to sbatch; returns the job's id.

    Raises:
        ConfigurationError: There is no Slurm here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigurationError(
            "There is no sbatch here, so this is no machine of a Slurm cluster. Use --print, and sbatch on one that is."
        )
    answer = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if answer.returncode:
        raise ConfigurationError(f"Slurm refuses the job: {answer.stderr.strip()}")
    return answer.stdout.strip().partition(";")[0]  # behind it a cluster's name, where there are several


def asked(*, job: SlurmJob, print: bool = False, submit: bool = False) -> tuple[SlurmJob, bool]:
    """Run on the nodes of a Slurm cluster, again after each interruption. What to run stands behind `--`.

    Args:
        job: The job.
        print: Print the script.
        submit: Submit it, and print the job's id.
    """
    if print == submit:
        raise ConfigurationError("Say either --print, for the script, or --submit.")
    return job, submit


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    job, shall_submit = asked(**parse_arguments(asked, arguments[:at], "launch slurm"))
    script = render(job, arguments[at + 1 :])
    if shall_submit:
        # Slurm makes no folders, and a job whose output it cannot write fails without a word.
        Path(job.output_pattern).parent.mkdir(parents=True, exist_ok=True)
        print(submit(script))
    else:
        sys.stdout.write(script)
    return 0


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _array(words: Sequence[str]) -> str:
    return f"({shlex.join(words)})"


def _refuse_what_sbatch_misreads(directive: str) -> None:
    """sbatch has a quoting of its own, ends a line at a comment, and knows no line in two."""
    odd = re.search(r"[\s\"'\\#`]", directive)
    if odd:
        raise ConfigurationError(
            f"#SBATCH --{directive}: {odd[0]!r} cannot be written there. Leave it out, or give it on sbatch's own "
            "command line."
        )
