"""The list of metrics: complete, bounded, and the same in docs/metrics.md."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.client import StageTimings
from encoder_svc.errors import CODES, Reason
from encoder_svc.observability.catalogue import GROUPS, METRICS
from encoder_svc.observability.definitions import LABEL_VALUES, LATENCY_BUCKETS_S, MetricDefinition
from encoder_svc.observability.describe import describe, rewrite
from encoder_svc.observability.stages import Stages

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)


def test_no_name_is_given_twice() -> None:
    assert len(METRICS) == sum(len(group.metrics) for group in GROUPS)


def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert rewrite(page) == page, "run `make docs`"


def test_the_page_names_every_metric_and_every_stage() -> None:
    text = describe()
    assert all(f"| `{name}` |" in text for name in METRICS)
    assert all(re.search(rf"^\| .*`{stage}`", text, flags=re.MULTILINE) for stage in LABEL_VALUES["stage"])


@every_metric
def test_names_follow_prometheus(metric: MetricDefinition) -> None:
    assert re.fullmatch(r"encoder_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert (metric.kind == "histogram") == bool(metric.buckets)
    if metric.unit == "seconds":
        assert "_seconds" in metric.name
    if metric.unit == "bytes":
        assert "_bytes" in metric.name


@every_metric
def test_every_metric_says_what_it_is_and_what_to_do(metric: MetricDefinition) -> None:
    assert metric.meaning.endswith(".")
    assert metric.when_it_moves.endswith(".")


@every_metric
def test_labels_are_bounded(metric: MetricDefinition) -> None:
    if metric.name == "encoder_build_info":
        return
    assert all(metric.labels.values())
    series = math.prod(len(values or ()) for label, values in metric.labels.items() if label != "code")
    assert series * (len(metric.buckets) + 3) < 500


def test_every_reason_and_code_that_the_server_gives_is_a_label_value() -> None:
    assert set(LABEL_VALUES["reason"]) == {"", *Reason}
    assert set(CODES.values()) < set(LABEL_VALUES["code"])


def test_every_method_of_the_service_is_a_label_value() -> None:
    service = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"]
    assert set(LABEL_VALUES["method"]) == {method.name for method in service.methods}


def test_the_wire_and_the_client_have_every_stage() -> None:
    ours = {entry.name for entry in fields(Stages)}
    assert {entry.name for entry in encoder_pb2.StageTimings.DESCRIPTOR.fields} == ours
    assert [entry.name for entry in fields(StageTimings)] == [entry.name for entry in fields(Stages)]


def test_latency_buckets_go_from_half_a_millisecond_to_a_minute_and_are_finer_below_100_ms() -> None:
    assert (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (0.0005, 60.0)
    steps = [(high, high / low) for low, high in pairwise(LATENCY_BUCKETS_S)]
    assert max(ratio for high, ratio in steps if 0.002 < high <= 0.1) <= 5 / 3 + 1e-9
    assert max(ratio for _, ratio in steps) <= 3
