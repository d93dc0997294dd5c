"""Our histograms beside prometheus-client's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from encoder_svc.observability.definitions import LATENCY_BUCKETS_S, MetricDefinition
from encoder_svc.observability.histogram import LoopHistogram

LABELS = {"stage": ("decode", "send")}


def histogram(buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> tuple[LoopHistogram, CollectorRegistry]:
    definition = MetricDefinition(
        name="x_seconds",
        kind="histogram",
        unit="seconds",
        meaning="X.",
        when_it_moves="Y.",
        labels=LABELS,
        buckets=buckets,
    )
    ours, registry = LoopHistogram(definition), CollectorRegistry()
    registry.register(ours)
    return ours, registry


def text(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


values = st.floats(0, 100) | st.sampled_from(LATENCY_BUCKETS_S)


@given(st.lists(st.tuples(st.sampled_from(LABELS["stage"]), values)))
def test_what_is_exported_is_what_prometheus_client_would(observed: list[tuple[str, float]]) -> None:
    ours, registry = histogram()
    theirs_registry = CollectorRegistry()
    theirs = Histogram("x_seconds", "X.", ["stage"], buckets=LATENCY_BUCKETS_S, registry=theirs_registry)
    for stage, value in observed:
        ours.series(stage).observe(value)
        theirs.labels(stage).observe(value)
    assert text(registry) == text(theirs_registry)


def test_a_bucket_carries_its_last_exemplar() -> None:
    ours, registry = histogram((0.1, 1.0))
    for value, trace_id in ((0.05, "a" * 32), (0.06, "b" * 32), (0.07, ""), (5.0, "c" * 32)):
        ours.series("send").observe(value, trace_id)
    buckets = [line.split("x_seconds_bucket")[1] for line in text(registry) if "_bucket" in line]
    assert [bucket.split(" # ")[0] for bucket in buckets] == [
        '{le="0.1",stage="send"} 3.0',
        '{le="1.0",stage="send"} 3.0',
        '{le="+Inf",stage="send"} 4.0',
    ]
    assert [bucket.split(" # ")[1].split()[:2] if " # " in bucket else None for bucket in buckets] == [
        [f'{{trace_id="{"b" * 32}"}}', "0.06"],
        None,
        [f'{{trace_id="{"c" * 32}"}}', "5.0"],
    ]


def test_labels_that_are_not_the_definitions_are_a_defect() -> None:
    ours, _ = histogram()
    with pytest.raises(AssertionError):
        ours.series("send", "more")
