"""Prints Grafana's dashboard, deploy/grafana/encoder-latency.json: ``make docs``."""

from __future__ import annotations

import json

from capacity import CACHE, DEVICE, REPLICAS_WANTED
from latency import DONE, MILLISECONDS, WAITING
from layout import Json, choice, data_source, lay_out
from replicas import REPLICAS

SECTIONS = {
    "Are users waiting?": WAITING,
    "Where do the milliseconds go?": MILLISECONDS,
    "How much is done?": DONE,
    "When is a replica to be added?": REPLICAS_WANTED,
    "Is the device full or idle?": DEVICE,
    "What does the cache save?": CACHE,
    "Which backend runs, and how do replicas compare?": REPLICAS,
}


def dashboard() -> Json:
    """The dashboard, as Grafana imports it."""
    return {
        "uid": "encoder-latency",
        "title": "Encoder latency",
        "description": "encoder-svc: are users waiting, where do the milliseconds go, is the device full, what is "
        "refused and why, which backend runs, when is a replica to be added.",
        "tags": ["encoder-svc"],
        "schemaVersion": 42,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                data_source(),
                choice("model", "Model", "label_values(encoder_build_info, model)"),
                choice(
                    "backend", "Attention backend", 'label_values(encoder_build_info{model=~"$model"}, attn_backend)'
                ),
                choice(
                    "replica",
                    "Replica",
                    'label_values(encoder_build_info{model=~"$model", attn_backend=~"$backend"}, instance)',
                ),
            ]
        },
        "panels": lay_out(SECTIONS),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
