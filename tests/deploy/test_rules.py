"""Rules and alerts: promtool takes them, each alert fires and stays quiet when it should, each has a runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.queries import ALERTS, DEPLOY, RULES, rules, selectors
from tests.tools import require

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENARIOS = Path(__file__).with_name("alert_tests.yaml")
RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"
NAMES = [rule["alert"] for rule in rules(ALERTS)]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([require("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", RULES, ALERTS)


def test_promtool_accepts_the_configuration() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yaml")


def test_each_alert_fires_and_stays_quiet_as_the_scenarios_say() -> None:
    promtool("test", "rules", SCENARIOS)


def evaluations() -> Iterator[tuple[set[str], set[str]]]:
    """Of each look at what fires: the metrics that the scenario has, and the alerts that fire."""
    for scenario in yaml.safe_load(SCENARIOS.read_text())["tests"]:
        metrics = {re.split(r"[{ ]", series["series"])[0] for series in scenario["input_series"]}
        for look in scenario.get("promql_expr_test", ()):
            if look["expr"] == 'ALERTS{alertstate="firing"}':
                yield metrics, {re.search(r'alertname="(\w+)"', s["labels"])[1] for s in look["exp_samples"]}


def metrics_behind(rule: dict[str, Any]) -> set[str]:
    """What the server says that an alert depends on, through recording rules."""
    recorded = {recording["record"]: recording for recording in rules(RULES)}
    return {
        metric
        for selector in selectors(rule["expr"])
        for metric in (metrics_behind(recorded[selector.name]) if selector.name in recorded else {selector.name})
    }


@pytest.mark.parametrize("alert", rules(ALERTS), ids=NAMES)
def test_a_scenario_has_the_alert_firing_and_another_has_it_quiet_on_the_same_metrics(alert: dict[str, Any]) -> None:
    assert any(alert["alert"] in firing for _, firing in evaluations())
    assert any(alert["alert"] not in firing for metrics, firing in evaluations() if metrics_behind(alert) <= metrics)


@pytest.mark.parametrize("alert", rules(ALERTS), ids=NAMES)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    sections = re.split(r"^## (\w+)\n", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert sections[1::2] == NAMES
    for text in sections[2::2]:
        assert "**Means:**" in text
        assert re.search(r"\*\*(Look at|Do):\*\*|\| what to do \|", text)
