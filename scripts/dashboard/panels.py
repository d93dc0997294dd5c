"""Grafana's panels in few words. Shapes after Grafana's dashboard schema 42."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One PromQL query and the name of its series."""

    expr: str
    legend: str = "__auto"
    instant: bool = False

    def target(self, ref_id: str, *, as_table: bool = False) -> Json:
        return {
            "refId": ref_id,
            "datasource": DATA_SOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "legendFormat": self.legend,
            "format": "table" if as_table else "time_series",
            "instant": self.instant,
            "range": not self.instant,
        }


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel. ``width`` in columns of 24, ``height`` in Grafana's rows; the rest is the kind's own."""

    title: str
    description: str
    kind: str
    queries: tuple[Query, ...]
    unit: str
    width: int
    height: int = 8
    custom: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    field_config: Json = field(default_factory=dict)
    overrides: tuple[Json, ...] = ()
    transformations: tuple[Json, ...] = ()

    def json(self, panel_id: int, x: int, y: int) -> Json:
        defaults = {"unit": self.unit, "min": 0, "custom": self.custom, **self.field_config}
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATA_SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": list(self.overrides)},
            "options": self.options,
            "targets": [
                query.target(chr(ord("A") + index), as_table=self.kind == "table")
                for index, query in enumerate(self.queries)
            ],
            **({"transformations": list(self.transformations)} if self.transformations else {}),
        }


def graph(
    title: str, description: str, *queries: Query, unit: str, width: int = 8, stacked: bool = False, dashed: str = ""
) -> Panel:
    """Lines over time, or areas on top of each other; series whose names match ``dashed`` are bounds."""
    bounds = {
        "matcher": {"id": "byRegexp", "options": dashed},
        "properties": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}],
    }
    return Panel(
        title=title,
        description=description,
        kind="timeseries",
        queries=queries,
        unit=unit,
        width=width,
        custom={
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        },
        options={
            "legend": {
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
                "calcs": ["mean", "lastNotNull"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        overrides=(bounds,) if dashed else (),
    )


def number(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str,
    width: int = 3,
    warn: float | None = None,
    worse: str = "above",
) -> Panel:
    """One figure with its recent course; coloured once it is ``above`` or ``below`` what ``warn`` says."""
    calm, alarmed = ("green", "red") if worse == "above" else ("red", "green")
    steps: list[Json] = [{"color": calm if warn is not None else "text", "value": None}]
    if warn is not None:
        steps.append({"color": alarmed, "value": warn})
    return Panel(
        title=title,
        description=description,
        kind="stat",
        queries=(Query(expr=expr),),
        unit=unit,
        width=width,
        height=4,
        options={
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "textMode": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        field_config={"thresholds": {"mode": "absolute", "steps": steps}},
    )


def bars(title: str, description: str, query: Query, *, unit: str, width: int = 6) -> Panel:
    """A bar for each series, as it is now."""
    return Panel(
        title=title,
        description=description,
        kind="bargauge",
        queries=(query,),
        unit=unit,
        width=width,
        options={
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showUnfilled": True,
            "valueMode": "text",
        },
        field_config={"thresholds": {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}},
    )


def table(title: str, description: str, query: Query, *, columns: tuple[str, ...], width: int = 24) -> Panel:
    """The labels of each series, in this order."""
    order = {name: index for index, name in enumerate(columns)}
    return Panel(
        title=title,
        description=description,
        kind="table",
        queries=(query,),
        unit="none",
        width=width,
        options={"showHeader": True, "cellHeight": "sm"},
        transformations=(
            {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
            {"id": "organize", "options": {"excludeByName": {}, "indexByName": order, "renameByName": {}}},
        ),
    )
