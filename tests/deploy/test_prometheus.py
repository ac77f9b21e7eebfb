"""What deploy/ has for Prometheus is valid, of metrics that there are, and tells what it should."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.observability import PROMETHEUS, checked, metrics_in, needs
from tests.resilience.exposition import full_status, names_of


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_reads_metrics_that_there_are_and_has_a_test(rule: dict[str, Any]) -> None:
    there_are = names_of(full_status().metrics())
    assert metrics_in(rule["expr"]) and metrics_in(rule["expr"]) <= there_are
    cases = [case for test in promtool_tests() for case in test["alert_rule_test"] if case["alertname"] == rule["alert"]]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}, "one time it tells, and one it does not"


def promtool_tests() -> list[dict[str, Any]]:
    return yaml.safe_load((PROMETHEUS / "alerts-test.yaml").read_text())["tests"]


def test_the_rules_are_tested_with_metrics_that_there_are() -> None:
    used = {name for test in promtool_tests() for series in test["input_series"] for name in metrics_in(series["series"])}
    assert used <= names_of(full_status().metrics())


@needs("promtool")
def test_the_rules_are_valid_and_tell_what_they_should() -> None:
    assert f"{len(rules())} rules found" in checked("promtool", "check", "rules", PROMETHEUS / "alerts.yaml")
    assert "SUCCESS" in checked("promtool", "test", "rules", PROMETHEUS / "alerts-test.yaml")


@needs("promtool", "amtool")
def test_the_examples_are_valid() -> None:
    checked("promtool", "check", "config", PROMETHEUS / "prometheus.yaml")
    checked("amtool", "check-config", PROMETHEUS / "alertmanager.yaml")
