"""Metrics of several processes as one set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from encoder_svc.observability.merge import Counted, add, counted, portable, what_only_grows
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGE = {"stage": "decode"}


def over_a_link(metrics: Metrics) -> Counted:
    return counted(portable(metrics.registry))


def values(metrics: Metrics) -> dict[str, float]:
    """What a scrape of the whole shows, by name and labels."""
    text = generate_latest(metrics.scraped()).decode()
    return {
        _name(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _name(name: str, labels: Mapping[str, str]) -> str:
    return f"{name}{json.dumps(dict(sorted(labels.items())))}"


@pytest.fixture
def whole() -> Metrics:
    """Of three processes."""
    own, others = Metrics(), [Metrics(), Metrics()]
    own.image_ended("cached")
    for number, other in enumerate(others):
        other.image_ended("encoded", Stages(decode_s=0.01 * (number + 1)), trace_id=f"{number + 1:032x}")
        other.request_ended("EncodeImages", "OK", "", 0.5)
        other.request_ended("EncodeImages", "SOMETHING", "NEW", 0.5)
        other.read_at_scrape({"encoder_requests_running": lambda: 2.0})
    own.read_at_scrape({"encoder_requests_running": lambda: 1.0, "encoder_ready": lambda: True})

    def count() -> Counted:
        total: Counted = {}
        for other in others:
            add(total, over_a_link(other))
        return total

    own.add_others(count)
    return own


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("encoder_images_total", {"outcome": "encoded"}, 2),
        ("encoder_images_total", {"outcome": "cached"}, 1),
        ("encoder_requests_total", {"method": "EncodeImages", "code": "OK", "reason": ""}, 2),
        ("encoder_requests_total", {"method": "EncodeImages", "code": "SOMETHING", "reason": "NEW"}, 2),
        ("encoder_requests_running", {}, 5),
        ("encoder_ready", {}, 1),
        ("encoder_stage_duration_seconds_count", STAGE, 2),
        ("encoder_stage_duration_seconds_bucket", STAGE | {"le": "+Inf"}, 2),
        ("encoder_stage_duration_seconds_bucket", STAGE | {"le": "0.01"}, 1),
    ],
)
def test_it_is_the_sum(whole: Metrics, name: str, labels: dict[str, str], value: float) -> None:
    assert values(whole)[_name(name, labels)] == value


def test_a_sum_of_seconds_is_one(whole: Metrics) -> None:
    assert values(whole)[_name("encoder_stage_duration_seconds_sum", STAGE)] == pytest.approx(0.03)


def test_memory_is_that_of_all(whole: Metrics) -> None:
    own = generate_latest(whole.registry).decode()
    [alone] = [float(line.split()[1]) for line in own.splitlines() if line.startswith("process_resident_memory_bytes")]
    assert values(whole)[_name("process_resident_memory_bytes", {})] > 2.5 * alone


def test_the_start_is_the_own(whole: Metrics) -> None:
    own = generate_latest(whole.registry).decode()
    [alone] = [float(line.split()[1]) for line in own.splitlines() if line.startswith("process_start_time_seconds")]
    assert values(whole)[_name("process_start_time_seconds", {})] == alone


def test_exemplars_stay(whole: Metrics) -> None:
    text = openmetrics(whole.scraped()).decode()
    assert f'trace_id="{1:032x}"' in text
    assert f'trace_id="{2:032x}"' in text


def test_of_a_process_that_is_gone_only_what_grows_stays() -> None:
    gone = Metrics()
    gone.image_ended("encoded", Stages(decode_s=0.01))
    gone.read_at_scrape({"encoder_requests_running": lambda: 1.0, "encoder_ready": lambda: True})
    names = {name for name, _ in what_only_grows(over_a_link(gone))}
    assert {"encoder_images_total", "encoder_stage_duration_seconds_bucket"} <= names
    assert not names & {"encoder_requests_running", "encoder_ready", "process_resident_memory_bytes"}


def test_what_adds_nothing_is_not_sent() -> None:
    other = Metrics()
    other.image_ended("encoded", Stages(decode_s=0.01))
    sent = {_name(name, dict(labels)) for name, labels in over_a_link(other)}
    assert _name("encoder_images_total", {"outcome": "encoded"}) in sent
    assert _name("encoder_images_total", {"outcome": "cached"}) not in sent
    assert _name("encoder_stage_duration_seconds_count", {"stage": "forward"}) not in sent
    # Of a histogram that has something all buckets, so that none is missing in the sum.
    assert _name("encoder_stage_duration_seconds_bucket", STAGE | {"le": "0.001"}) in sent


def test_a_scrape_of_some_metrics_is_a_sum_too(whole: Metrics) -> None:
    text = generate_latest(whole.scraped().restricted_registry(["encoder_requests_running"])).decode()
    assert [line for line in text.splitlines() if not line.startswith("#")] == ["encoder_requests_running 5.0"]
