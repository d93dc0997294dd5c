"""A report as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encoder_svc.bench.mix import MixShare
    from encoder_svc.bench.report import Load, Report
    from encoder_svc.bench.samples import Distribution


def table(report: Report) -> str:
    """Every figure of the report that a person wants, times in milliseconds."""
    return "\n".join([*_setting(report), "", *_counts(report), "", *_times(report), "", *_errors(report)])


def _setting(report: Report) -> list[str]:
    target = report.target
    interrupted = ", interrupted" if report.interrupted else ""
    return [
        f"target    {target.address}: {target.model} {target.dtype}, {target.attn_backend} "
        f"({target.attn_implementation}), {target.device_name}, server {target.server_version}",
        f"load      {_loop(report.load)}, timeout {report.load.timeout_s:g} s, seed {report.load.seed}, "
        f"{'unique' if report.load.unique else 'repeated'} images",
        *(
            f"{'mix' if number == 0 else '':<10}{share.share:>4.0%}  {_share(share)}"
            for number, share in enumerate(report.load.mix)
        ),
        f"measured  {report.window_s:.1f} s after {report.load.warmup_s:g} s of warm-up{interrupted}; "
        f"{report.wall_s:.1f} s in all; load generator at {report.client_cpu_ratio:.0%} of one core",
    ]


def _loop(load: Load) -> str:
    if load.rate is None:
        return f"closed loop, concurrency {load.concurrency}"
    return f"open loop, {load.rate:g} requests/s, at most {load.max_outstanding} outstanding"


def _share(share: MixShare) -> str:
    least, most = share.images
    num_images = f"{least}" if least == most else f"{least}–{most}"
    return f"{share.name} × {num_images}, {share.image_bytes / 1e3:,.1f} kB each"


def _counts(report: Report) -> list[str]:
    requests, images, rates = report.requests, report.images, report.rates
    return [
        f"requests  {requests.due:,} due: {requests.succeeded:,} succeeded, {requests.partly_failed:,} partly failed, "
        f"{requests.failed:,} failed, {requests.unfinished:,} unfinished, {requests.not_sent:,} not sent",
        f"images    {images.encoded:,} encoded, {images.failed:,} failed",
        f"rate      {rates.images_per_s:,.1f} images/s, {rates.patches_per_s:,.0f} patches/s, "
        f"{rates.rows_per_s:,.0f} rows/s, {rates.megabytes_per_s:,.2f} MB/s out, "
        f"{rates.requests_per_s:,.1f} requests/s",
        f"goodput   {rates.goodput_images_per_s:,.1f} images/s",
    ]


def _times(report: Report) -> list[str]:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    rows = (
        ("latency", report.latency_s),
        ("first embedding", report.first_embedding_s),
        ("latency of failures", report.failure_latency_s),
        ("sent late by", report.send_lag_s),
        ("retry after", report.retry_after_s),
    )
    stages = (
        f"  {name:<20}{stage.mean_s * 1e3:>10,.2f}{'':>20}{stage.p95_s * 1e3:>10,.2f}"
        for name, stage in report.stages.items()
    )
    return [
        f"{'milliseconds':<22}" + "".join(f"{column:>10}" for column in columns) + f"{'count':>11}",
        *(_time_row(name, times) for name, times in rows if times is not None),
        *(("server, by image", *stages) if report.stages else ()),
    ]


def _time_row(name: str, times: Distribution) -> str:
    values = (times.mean, times.p50, times.p90, times.p95, times.p99, times.max)
    return f"{name:<22}" + "".join(f"{value * 1e3:>10,.2f}" for value in values) + f"{times.count:>11,}"


def _errors(report: Report) -> list[str]:
    if not report.errors:
        return ["errors    none"]
    return ["errors", *(f"{kind.count:>9,}  {kind.reason} ({kind.code}, {kind.scope})" for kind in report.errors)]
