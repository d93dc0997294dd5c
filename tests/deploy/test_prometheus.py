"""A real Prometheus scrapes a real server under load: every query that is shipped has an answer."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.deploy.queries import (
    ALERTS,
    DEPLOY,
    RULES,
    Shipped,
    dashboard,
    panel_queries,
    rule_queries,
    rules,
    selectors,
    without_thresholds,
)
from tests.ports import free_port
from tests.prometheus import Prometheus
from tests.serving import ServerProcess
from tests.tools import require
from tests.traffic import MAX_INFLIGHT_IMAGES, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Until the slowest series has the two scrapes that a rate needs, and each kind of caller has called.
PATIENCE_S = 40


class Watched:
    """A Prometheus, asked until its answer has a number in it or the patience that all tests share is at its end."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.prometheus = prometheus
        self._deadline_s = time.monotonic() + PATIENCE_S

    def assert_answers(self, expr: str) -> None:
        while not any(not math.isnan(value) for value in self.prometheus.values(expr)):
            assert time.monotonic() < self._deadline_s, f"no answer to: {expr}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def watched(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    require("prometheus")
    server = ServerProcess(
        *("--model", tiny_checkpoint("qwen2_5_vl"), "--device", "cpu"),
        *("--metrics-port", "0", "--max-inflight-images", str(MAX_INFLIGHT_IMAGES)),
    )
    with (
        server,
        Traffic(server.target),
        Prometheus(
            DEPLOY / "prometheus" / "prometheus.yaml",
            scrapes=f"127.0.0.1:{server.metrics_port}",
            port=free_port(),
            folder=tmp_path_factory.mktemp("prometheus"),
        ) as prometheus,
    ):
        yield Watched(prometheus)


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.where)
def test_every_panel_has_something_to_show(watched: Watched, query: Shipped) -> None:
    watched.assert_answers(query.expr)


@pytest.mark.parametrize("rule", rules(RULES), ids=lambda rule: rule["record"])
def test_every_recording_rule_records(watched: Watched, rule: dict[str, str]) -> None:
    watched.assert_answers(rule["expr"])
    watched.assert_answers(rule["record"])


@pytest.mark.parametrize("alert", rules(ALERTS), ids=lambda alert: alert["alert"])
def test_what_an_alert_compares_is_there_while_all_is_well(watched: Watched, alert: dict[str, str]) -> None:
    for compared in without_thresholds(alert["expr"]):
        watched.assert_answers(compared)


@pytest.mark.parametrize("query", [*panel_queries(), *rule_queries()], ids=lambda query: query.where)
def test_every_series_that_a_query_reads_is_there(watched: Watched, query: Shipped) -> None:
    for selector in selectors(query.expr):
        watched.assert_answers(str(selector))


def test_prometheus_evaluates_every_rule_without_error(watched: Watched) -> None:
    watched.assert_answers(rules(RULES)[-1]["record"])
    evaluated = [rule for group in watched.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in evaluated} == {r.get("record") or r["alert"] for r in rules(RULES) + rules(ALERTS)}
    assert [rule for rule in evaluated if rule["health"] != "ok" or rule.get("lastError")] == []


def test_every_variable_has_values(watched: Watched) -> None:
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()
            for name in ("model", "backend", "replica"):
                selector = selector.replace(f"${name}", ".+")
            assert watched.prometheus.ask(f"label/{label}/values", **{"match[]": selector})
