"""A call's record, and what it makes of itself at its end."""

from __future__ import annotations

import logging
from itertools import count

import pytest

from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.stages import STAGES, Stages

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def observer() -> Observer:
    """Each look at its clock is a second later."""
    seconds = count()
    return Observer(Metrics(), clock=lambda: next(seconds))


def value(observer: Observer, name: str, **labels: str) -> float | None:
    return observer.metrics.registry.get_sample_value(name, labels)


def test_images_that_are_never_answered_count_as_cancelled(observer: Observer) -> None:
    with observer.request("EncodeImages", "", ()) as record:
        record.admitted(3, 100)
        record.image_failed(1, "IMAGE_CORRUPT")
    assert value(observer, "encoder_images_total", outcome="cancelled") == 2
    assert value(observer, "encoder_images_total", outcome="failed") == 1
    assert value(observer, "encoder_request_bytes_total") == 100


def test_an_error_that_leaves_the_record_still_ends_it(observer: Observer) -> None:
    with pytest.raises(RuntimeError), observer.request("EncodeImages", "", ()) as record:  # noqa: PT012
        assert observer.num_running == 1
        record.failed("INTERNAL", "INTERNAL")
        raise RuntimeError
    assert observer.num_running == 0
    assert value(observer, "encoder_requests_total", method="EncodeImages", code="INTERNAL", reason="INTERNAL") == 1


def test_the_first_image_alone_gives_the_time_to_first_embedding(observer: Observer) -> None:
    with observer.request("EncodeImages", "", ()) as record:
        record.admitted(2)
        record.image_sent(1, "encoded", Stages(), num_rows=4, num_bytes=64)
        record.image_sent(0, "encoded", Stages(), num_rows=4, num_bytes=64)
    assert record.first_embedding_s == 1
    assert value(observer, "encoder_time_to_first_embedding_seconds_sum", method="EncodeImages") == 1
    assert value(observer, "encoder_request_duration_seconds_sum", method="EncodeImages", code="OK") == 2


def test_a_stage_that_an_image_never_met_is_not_observed(observer: Observer) -> None:
    with observer.request("EncodeImages", "", ()) as record:
        record.image_sent(0, "cached", Stages(admission_s=0.25, send_s=0.5), num_rows=4, num_bytes=64)
    counts = {stage: value(observer, "encoder_stage_duration_seconds_count", stage=stage) for stage in STAGES}
    assert {stage for stage, times in counts.items() if times} == {"admission", "send"}


def test_one_line_is_logged_with_the_means_of_the_stages(observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), observer.request("EncodeImages", "r-1", ()) as record:
        record.admitted(3)
        record.image_sent(0, "encoded", Stages(decode_s=0.1, send_s=0.01), num_rows=4, num_bytes=64)
        record.image_sent(1, "encoded", Stages(decode_s=0.3), num_rows=4, num_bytes=64)
        record.image_failed(2, "IMAGE_FORMAT")
    [line] = caplog.records
    assert line.getMessage() == "EncodeImages OK"
    assert line.fields == {
        "method": "EncodeImages",
        "code": "OK",
        "reason": "",
        "request_id": "r-1",
        "trace_id": "",
        "images": 3,
        "failed": 1,
        "rows": 8,
        "bytes": 128,
        "duration_ms": 2000.0,
        "stages_ms": {"decode": 200.0, "send": 5.0},
    }


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01", TRACE_ID),
        (f"cc-{TRACE_ID}-00f067aa0ba902b7-01-what-the-future-is-like", TRACE_ID),
        (f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01", ""),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", ""),
        (f"00-{TRACE_ID}-{'0' * 16}-01", ""),
        (f"00-{TRACE_ID}-00f067aa0ba902b7", ""),
        ("x" * 100_000, ""),
        ("", ""),
    ],
)
def test_the_callers_trace_is_read_and_nothing_else(observer: Observer, traceparent: str, trace_id: str) -> None:
    record = observer.request("EncodeImages", "", [("traceparent", traceparent), ("other-bin", b"\xff")])
    assert record.trace_id == trace_id
    assert record.metadata() == ()


def test_stages_keep_their_order() -> None:
    stages = Stages(send_s=4.0, admission_s=1.0, forward_s=2.0)
    assert [name for name, seconds in stages.items() if seconds] == ["admission", "forward", "send"]


def test_refusals_are_counted_each_and_logged_together(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    observer = Observer(Metrics(), clock=lambda: now_s)
    with caplog.at_level(logging.INFO):
        for now_s in (1.0, 1.1, 1.9, 2.1):  # noqa: B007 (the clock's)
            observer.refused("EncodeImages", (), "RESOURCE_EXHAUSTED", "QUEUE_FULL")
    counts = {"method": "EncodeImages", "code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL"}
    assert value(observer, "encoder_requests_total", **counts) == 4
    assert [record.__dict__["fields"]["refused"] for record in caplog.records] == [1, 3]
    assert observer.num_running == 0
