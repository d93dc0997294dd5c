"""The PromQL that is shipped, and what it is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = DEPLOY / "grafana" / "encoder-latency.json"

_SET_OPERATORS = {"and", "or", "unless"}
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}


@dataclass(frozen=True)
class Shipped:
    """A query and where it stands."""

    where: str
    expr: str


@cache
def rules(path: Path) -> list[dict[str, Any]]:
    """A file's rules, of all its groups."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panel_queries() -> list[Shipped]:
    """Of each panel, with ``$replica`` for any and ``$__rate_interval`` for 10 s."""
    return [
        Shipped(
            f"panel {panel['title']!r}",
            target["expr"].replace("$replica", ".+").replace("$__rate_interval", "10s"),
        )
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def rule_queries() -> list[Shipped]:
    return [
        Shipped(rule.get("record") or f"alert {rule['alert']}", rule["expr"]) for rule in rules(RULES) + rules(ALERTS)
    ]


def selectors(expr: str) -> list[promql.VectorSelector]:
    """Every series that a query reads."""
    found: list[promql.VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)

    promql.walk(promql.parse(expr), visit)
    return found


def without_thresholds(expr: str) -> list[str]:
    """What an alert compares, with the comparisons taken away: each of these has a value also while all is well."""
    return [str(node) for node in _compared(promql.parse(expr))]


def _compared(node: Any) -> list[Any]:
    match node:
        case promql.ParenExpr():
            return _compared(node.expr)
        case promql.BinaryExpr() if str(node.op) in _SET_OPERATORS | _COMPARISONS:
            return [part for side in (node.lhs, node.rhs) if selectors(str(side)) for part in _compared(side)]
        case promql.Call() if node.func.name == "absent":
            return list(node.args)
        case _:
            return [node]
