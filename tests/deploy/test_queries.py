"""Every query that is shipped reads metrics, labels and values that the catalogue has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from encoder_svc.observability.catalogue import METRICS
from tests.deploy.queries import (
    ALERTS,
    RULES,
    Shipped,
    dashboard,
    panel_queries,
    rule_queries,
    rules,
    selectors,
    without_thresholds,
)

if TYPE_CHECKING:
    import promql_parser as promql

RECORDED = {rule["record"] for rule in rules(RULES)}
FROM_ELSEWHERE = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
LABELS_OF_SCRAPES = {"instance", "job", "namespace"}


@pytest.mark.parametrize("query", [*panel_queries(), *rule_queries()], ids=lambda query: query.where)
def test_a_query_reads_what_the_server_offers(query: Shipped) -> None:
    for selector in selectors(query.expr):
        if selector.name in RECORDED | FROM_ELSEWHERE:
            continue
        metric = METRICS[re.sub(r"_(bucket|sum|count)$", "", selector.name)]
        assert (metric.kind == "histogram") == (metric.name != selector.name)
        for matcher in selector.matchers.matchers:
            check_label(
                matcher, {**metric.labels, **({"le": tuple(map(str, metric.buckets))} if metric.buckets else {})}
            )


def check_label(matcher: promql.Matcher, labels: dict[str, tuple[str, ...] | None]) -> None:
    if matcher.name in LABELS_OF_SCRAPES:
        return
    values = labels[matcher.name]
    assert values is not None, "a value that differs from server to server"
    alternatives = matcher.value.split("|") if "Re" in str(matcher.op) else [matcher.value]
    assert set(alternatives) <= set(values)


def test_thresholds_are_taken_away_and_nothing_else() -> None:
    assert without_thresholds("(a > 1 and b{x='y'} == 2 * c) or absent(d) unless time() - e >= 30") == [
        "a{}",
        'b{x="y"}',
        "2 * c{}",
        "d{}",
        "time() - e{}",
    ]


def test_every_recorded_series_is_used() -> None:
    used = {selector.name for rule in rules(ALERTS) for selector in selectors(rule["expr"])}
    assert used >= RECORDED


def test_the_variables_narrow_each_other_down_to_replicas() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "model", "backend", "replica"]
    assert "$model" in variables["backend"]["definition"]
    assert {"$model", "$backend"} <= set(re.findall(r"\$\w+", variables["replica"]["definition"]))


def test_every_panel_is_about_the_chosen_replicas() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            assert all(
                'instance=~"$replica"' in str(s) for s in selectors(target["expr"].replace("$__rate_interval", "1m"))
            )


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
