"""What deploy/ has for Prometheus is valid, of metrics that there are, and tells what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_llm.launch.kubernetes import Options, manifests
from tests.deploy.observability import PROMETHEUS, checked, metrics_in, needs
from tests.resilience.exposition import full_status, names_of


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_reads_metrics_that_there_are_and_has_a_test(rule: dict[str, Any]) -> None:
    there_are = names_of(full_status().metrics())
    assert metrics_in(rule["expr"]) and metrics_in(rule["expr"]) <= there_are
    cases = [case for test in unit_tests() for case in test["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}, "one time it tells, and one it does not"


def unit_tests() -> list[dict[str, Any]]:
    return yaml.safe_load((PROMETHEUS / "alerts-test.yaml").read_text())["tests"]


def test_the_rules_are_tested_with_metrics_that_there_are() -> None:
    series = [series["series"] for test in unit_tests() for series in test["input_series"]]
    used = set().union(*map(metrics_in, series))
    assert used <= names_of(full_status().metrics())


@needs("promtool")
def test_the_rules_are_valid_and_tell_what_they_should() -> None:
    assert f"{len(rules())} rules found" in checked("promtool", "check", "rules", PROMETHEUS / "alerts.yaml")
    assert "SUCCESS" in checked("promtool", "test", "rules", PROMETHEUS / "alerts-test.yaml")


@needs("promtool", "amtool")
def test_the_examples_are_valid() -> None:
    checked("promtool", "check", "config", PROMETHEUS / "prometheus.yaml")
    checked("amtool", "check-config", PROMETHEUS / "alertmanager.yaml")


@needs("promtool")
def test_in_a_cluster_the_pods_of_a_run_are_found_and_others_are_not(tmp_path: Path) -> None:
    """With the labels that Prometheus gives pods, since Debian's cannot ask a cluster."""
    options = Options(nodes=2, nproc_per_node=8, image="image", name="my-run")
    [made] = manifests(options, ["script.py"])
    pods = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]
    ours = {
        **{meta("annotation", name): value for name, value in pods["annotations"].items()},
        **{meta("label", name): value for name, value in pods["labels"].items()},
    }

    def target(name: str, phase: str, **labels: str) -> dict[str, Any]:
        of_pod = {"__meta_kubernetes_pod_name": name, "__meta_kubernetes_pod_phase": phase}
        return {"targets": ["10.0.0.7:29500"], "labels": {**labels, **of_pod}}

    configuration = yaml.safe_load((PROMETHEUS / "kubernetes.yaml").read_text())
    [scrape] = configuration["scrape_configs"]
    assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    others = {name: value for name, value in ours.items() if "run" not in name}
    scrape["static_configs"] = [
        target("my-run-node-0-0", "Running", **ours),
        target("my-run-node-0-1", "Succeeded", **ours),
        target("a-web-server", "Running", **others),
        target("not-annotated", "Running"),
    ]
    configuration["rule_files"] = []
    (tmp_path / "kubernetes.yaml").write_text(yaml.safe_dump(configuration))
    checked("promtool", "check", "config", tmp_path / "kubernetes.yaml")
    discovery = "promtool", "check", "service-discovery", "--timeout=2s"
    told = checked(*discovery, tmp_path / "kubernetes.yaml", scrape["job_name"])
    kept = [found["labels"] for found in json.loads(told) if found["labels"]]
    [labels] = kept
    assert labels["__address__"] == "10.0.0.7:9400"
    assert (labels["job"], labels["instance"]) == ("my-run", "my-run-node-0-0")


def meta(kind: str, name: str) -> str:
    return f"__meta_kubernetes_pod_{kind}_" + re.sub(r"\W", "_", name)
