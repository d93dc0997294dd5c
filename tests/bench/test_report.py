"""The report of a made-up run: its keys are frozen, its figures add up."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from encoder_svc.bench.load import LoadOptions, Run
from encoder_svc.bench.mix import Mix, MixEntry
from encoder_svc.bench.recorder import Exchange, Recorder
from encoder_svc.bench.report import Report, make_report
from encoder_svc.bench.table import table
from encoder_svc.client.types import AttentionInfo, LimitsInfo, ModelInfo, ProcessorInfo
from encoder_svc.errors import Reason, request_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.client.types import EncodedImage

INFO = ModelInfo(
    model="tiny", revision="r", family="qwen2_vl", dtype="float32", out_hidden_size=8, num_deepstack=0, width=8,
    patch_size=14, temporal_patch_size=2, spatial_merge_size=2, in_channels=3,
    processor=ProcessorInfo(
        min_pixels=1, max_pixels=2, image_mean=(), image_std=(), resize="torch", hash="h", image_processing="host"
    ),
    limits=LimitsInfo(
        max_image_bytes=1, max_request_bytes=1, max_image_side=1, max_image_pixels=1, max_aspect_ratio=1, max_images=1,
        max_request_patches=1, max_chunk_bytes=1,
    ),
    attention=AttentionInfo(
        backend="TORCH_SDPA", implementation="torch", source="platform", reason="", implementation_version="",
        rejected=(),
    ),
    transports=("stream",), platform="cpu", device_name="x", config_hash="c", server_version="0",
)  # fmt: skip


def run_of(encoded: Callable[..., EncodedImage]) -> Run:
    """Ten requests a tenth of a second apart, each answered in 50 ms; one refused, one not sent; 2 s measured."""
    recorder = Recorder(began_s=0.0, window_starts_s=0.0, window_ends_s=2.0, timeout_s=1.0)
    for number in range(10):
        due_s = number / 10
        recorder.image(encoded((1, 4, 6)), due_s + 0.04)
        recorder.ended(
            Exchange(due_s=due_s, sent_s=due_s, num_images=1, first_s=due_s + 0.04, ended_s=due_s + 0.05, num_encoded=1)
        )
    refusal = request_error(Reason.QUEUE_FULL, "full", retry_after_s=0.5)
    recorder.ended(Exchange(due_s=1.5, sent_s=1.5, num_images=1, ended_s=1.51, errors=[refusal]))
    recorder.not_sent(1.6)
    return Run(recorder=recorder, interrupted=False, wall_s=2.1, client_cpu_ratio=0.5)


def report_of(run: Run, *, rate: float | None = 6.0) -> Report:
    mix = Mix([MixEntry(size=(8, 8), format="raw")], images_per_request=(1, 1), unique=True, seed=0)
    options = LoadOptions(rate=rate, duration_s=2.0, warmup_s=0.0)
    return make_report(run, address="here:1", info=INFO, options=options, mix=mix, unique=True)


def keys_of(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {key for name, part in value.items() for key in keys_of(part, f"{prefix}.{name}" if prefix else name)}


def test_keys_are_frozen(encoded) -> None:
    spread = ("count", "mean", "p50", "p90", "p95", "p99", "max")
    groups = {
        "target": "address model revision family dtype width attn_backend attn_implementation attn_source platform "
        "device_name config_hash server_version",
        "load": "loop concurrency rate max_outstanding duration_s warmup_s timeout_s seed unique mix",
        "versions": "encoder_svc python grpc numpy",
        "requests": "due sent succeeded partly_failed failed unfinished not_sent",
        "images": "encoded failed",
        "rates": "requests_per_s images_per_s patches_per_s rows_per_s megabytes_per_s goodput_images_per_s",
        "timeline": "bin_s images errors",
        **dict.fromkeys(
            ("latency_s", "first_embedding_s", "failure_latency_s", "send_lag_s", "retry_after_s"), " ".join(spread)
        ),
        **{
            f"stages.{stage}": "mean_s p95_s"
            for stage in (
                *("admission", "window", "shared", "decode_wait", "decode", "resize", "queue", "build"),
                *("device_wait", "h2d", "forward", "d2h", "collect", "send_wait", "send"),
            )
        },
    }
    expected = {f"{group}.{key}" for group, keys in groups.items() for key in keys.split()}
    expected |= {
        "schema_version", "interrupted", "window_s", "wall_s", "client_cpu_ratio", "percentile_method", "errors"
    }  # fmt: skip
    values = json.loads(json.dumps(asdict(report_of(run_of(encoded))), allow_nan=False))
    assert keys_of(values) == expected
    assert set(values["errors"][0]) == {"scope", "code", "reason", "count"}
    assert set(values["load"]["mix"][0]) == {"name", "share", "images", "image_bytes"}


def test_figures_are_those_of_the_run(encoded) -> None:
    report = report_of(run_of(encoded))
    assert asdict(report.requests) == {
        "due": 12, "sent": 11, "succeeded": 10, "partly_failed": 0, "failed": 1, "unfinished": 0, "not_sent": 1
    }  # fmt: skip
    assert (report.images.encoded, report.images.failed) == (10, 1)
    rates = report.rates
    assert (rates.requests_per_s, rates.images_per_s, rates.goodput_images_per_s) == pytest.approx((5.0, 5.0, 5.0))
    assert (rates.patches_per_s, rates.rows_per_s) == pytest.approx((120.0, 30.0))
    assert rates.megabytes_per_s == pytest.approx(10 * 6 * 8 * 4 / 2 / 1e6)
    assert report.latency_s.p99 == pytest.approx(0.05)
    assert report.first_embedding_s.p50 == pytest.approx(0.04)
    assert report.failure_latency_s.max == pytest.approx(0.01)
    assert report.retry_after_s.mean == 0.5
    assert report.stages["forward"].mean_s == pytest.approx(0.01)
    assert report.exit_code == 0


def test_a_run_in_which_nothing_succeeded_has_no_percentiles_and_exits_with_1() -> None:
    recorder = Recorder(began_s=0.0, window_starts_s=2.0, window_ends_s=3.0, timeout_s=1.0)
    recorder.interrupt(1.0)
    report = report_of(Run(recorder=recorder, interrupted=True, wall_s=1.0, client_cpu_ratio=0.0), rate=None)
    assert report.exit_code == 1
    assert report.latency_s is report.send_lag_s is None
    assert report.rates.images_per_s == report.window_s == 0.0
    json.dumps(asdict(report), allow_nan=False)
    assert "interrupted" in table(report)


def test_the_table_says_it_all(encoded) -> None:
    text = table(report_of(run_of(encoded)))
    for part in (
        "here:1: tiny float32, TORCH_SDPA",
        "open loop, 6 requests/s, at most 1024 outstanding",
        "100%  8×8 raw × 1",
        "12 due: 10 succeeded, 0 partly failed, 1 failed, 0 unfinished, 1 not sent",
        "5.0 images/s, 120 patches/s, 30 rows/s",
        "1  QUEUE_FULL (RESOURCE_EXHAUSTED, request)",
        "retry after",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 140
