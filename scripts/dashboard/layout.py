"""Where panels stand, and the variables above them."""

from __future__ import annotations

from itertools import count

from panels import DATA_SOURCE, Json, Panel

WIDTH = 24


def lay_out(sections: dict[str, tuple[Panel, ...]]) -> list[Json]:
    """Sections under each other, each below its title, their panels in lines from left to right."""
    panels: list[Json] = []
    numbers = count(1)
    y = 0
    for title, section in sections.items():
        row = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        panels.append(
            {"id": next(numbers), "type": "row", "title": title, "collapsed": False, "gridPos": row, "panels": []}
        )
        x, y, line_height = 0, y + 1, 0
        for panel in section:
            if x + panel.width > WIDTH:
                x, y, line_height = 0, y + line_height, 0
            panels.append(panel.json(next(numbers), x, y))
            x, line_height = x + panel.width, max(line_height, panel.height)
        y += line_height
    return panels


def choice(name: str, label: str, values_of: str) -> Json:
    """A variable that chooses among a label's values; all of them at first."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATA_SOURCE,
        "definition": values_of,
        "query": {"query": values_of, "refId": f"{name}-values", "qryType": 1},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        "options": [],
        "regex": "",
        "hide": 0,
        "skipUrlSync": False,
    }


def data_source() -> Json:
    """The variable that chooses the Prometheus."""
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "options": [],
        "regex": "",
        "refresh": 1,
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "skipUrlSync": False,
    }
