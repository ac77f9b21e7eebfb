"""`lightning-llm doctor`; cli.py calls `main`."""

from __future__ import annotations

import dataclasses
import os

from lightning_llm.arguments import parse_arguments
from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.doctor.report import render, to_json
from lightning_llm.errors import ConfigurationError


def doctor(*, cluster: bool = False, json: bool = False, ranks: ClusterSettings) -> int:
    """Tell what this machine offers, and what is missing for what; with --cluster, whether all ranks are fit for a run.

    Args:
        cluster: Measure all ranks against each other. Alone it starts its processes on this machine; started by
            torchrun, by srun or by what sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT it is one rank.
        json: Print JSON instead of a table.
        ranks: With --cluster.

    Returns:
        The exit code: 0 all is well, 1 there is a problem.
    """
    if cluster:
        # Before torch is imported: it prints a C++ stack for each time limit, and what those mean is told here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from lightning_llm.doctor.cluster.start import check_cluster

        return check_cluster(ranks, json)
    if changed := [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(ranks)
        if getattr(ranks, field.name) != field.default
    ]:
        raise ConfigurationError(f"{', '.join(changed)} without --cluster: give that too, or leave them out.")

    from lightning_llm.doctor.machine import collect

    findings = collect()
    if json:
        print(to_json(findings))
    else:
        render(findings)
    return int(any(finding.status == "problem" for finding in findings))


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return doctor(**parse_arguments(doctor, arguments))
