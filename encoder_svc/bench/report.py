"""A run's figures as one object. Its fields are the keys of ``--json``; fields are only ever added."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc
import numpy as np

from encoder_svc import __version__
from encoder_svc.bench.recorder import STAGES
from encoder_svc.bench.samples import PERCENTILE_METHOD, Distribution

if TYPE_CHECKING:
    from encoder_svc.bench.load import LoadOptions, Run
    from encoder_svc.bench.mix import Mix, MixShare
    from encoder_svc.client.types import ModelInfo

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The server, as GetModelInfo described it before the run."""

    address: str
    model: str
    revision: str
    family: str
    dtype: str
    width: int
    attn_backend: str
    attn_implementation: str
    attn_source: str
    platform: str
    device_name: str
    config_hash: str
    server_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What was asked for. ``concurrency`` is None in open loop, ``rate`` and ``max_outstanding`` in closed loop."""

    loop: str
    concurrency: int | None
    rate: float | None
    max_outstanding: int | None
    duration_s: float
    warmup_s: float
    timeout_s: float
    seed: int
    unique: bool
    mix: tuple[MixShare, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Requests due in the window. due = sent + not_sent; sent = succeeded + partly_failed + failed + unfinished.

    Attributes:
        succeeded: every image did.
        partly_failed: some did; or all, and the call failed even so: its deadline passed before its last message.
        failed: none did.
        unfinished: running when the run was interrupted.
        not_sent: due while max_outstanding others ran, or still unsent a second after the window, by a load generator
            that cannot keep up.
    """

    due: int
    sent: int
    succeeded: int
    partly_failed: int
    failed: int
    unfinished: int
    not_sent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Images of the requests due in the window that ended."""

    encoded: int
    failed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What arrived in the window, a second.

    Attributes:
        requests_per_s: requests whose images all succeeded.
        patches_per_s: t * h * w of each image.
        megabytes_per_s: embeddings, in 10^6 bytes.
        goodput_images_per_s: images of requests that succeeded as a whole within the timeout.
    """

    requests_per_s: float
    images_per_s: float
    patches_per_s: float
    rows_per_s: float
    megabytes_per_s: float
    goodput_images_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Seconds that images spent in one stage of the server."""

    mean_s: float
    p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCount:
    """Errors of one kind, of the requests due in the window. ``scope`` is ``request`` or ``image``."""

    scope: str
    code: str
    reason: str
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Images and errors by when they arrived, from the run's start (warm-up included) to the window's end."""

    bin_s: float
    images: tuple[int, ...]
    errors: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    encoder_svc: str
    python: str
    grpc: str
    numpy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that one run measured; ``encoder_svc.bench`` says what is counted.

    Attributes:
        window_s: what the rates are divided by.
        wall_s: the whole run: warm-up, window, last answers.
        client_cpu_ratio: the load generator's CPU seconds a second; near 1 it, and not the server, is the bound.
        latency_s, first_embedding_s: of requests that succeeded.
        failure_latency_s: of those that failed, wholly or in part.
        send_lag_s: how late requests were sent; open loop only.
        retry_after_s: RetryInfo of the errors that had one.
    """

    schema_version: int
    target: Target
    load: Load
    versions: Versions
    interrupted: bool
    window_s: float
    wall_s: float
    client_cpu_ratio: float
    requests: Requests
    images: Images
    rates: Rates
    percentile_method: str
    latency_s: Distribution | None
    first_embedding_s: Distribution | None
    failure_latency_s: Distribution | None
    send_lag_s: Distribution | None
    stages: dict[str, Stage]
    errors: tuple[ErrorCount, ...]
    retry_after_s: Distribution | None
    timeline: Timeline

    @property
    def exit_code(self) -> int:
        """0 if any image was encoded, else 1."""
        return 0 if self.images.encoded or self.rates.images_per_s else 1


def make_report(run: Run, *, address: str, info: ModelInfo, options: LoadOptions, mix: Mix, unique: bool) -> Report:
    """Sums up a finished run."""
    seen = run.recorder
    return Report(
        schema_version=SCHEMA_VERSION,
        target=_target(address, info),
        load=_load(options, mix, unique=unique),
        versions=Versions(
            encoder_svc=__version__, python=platform.python_version(), grpc=grpc.__version__, numpy=np.__version__
        ),
        interrupted=run.interrupted,
        window_s=seen.window_s,
        wall_s=run.wall_s,
        client_cpu_ratio=run.client_cpu_ratio,
        requests=_requests(run),
        images=Images(encoded=seen.num_images_encoded, failed=seen.num_images_failed),
        rates=_rates(run),
        percentile_method=PERCENTILE_METHOD,
        latency_s=seen.latency_s.distribution(),
        first_embedding_s=seen.first_embedding_s.distribution(),
        failure_latency_s=seen.failure_latency_s.distribution(),
        send_lag_s=seen.send_lag_s.distribution() if options.rate else None,
        stages=_stages(run),
        errors=tuple(
            ErrorCount(scope=kind.scope, code=kind.code, reason=kind.reason, count=count)
            for kind, count in seen.errors.most_common()
        ),
        retry_after_s=seen.retry_after_s.distribution(),
        timeline=Timeline(bin_s=seen.bin_s, images=tuple(seen.images_by_bin), errors=tuple(seen.errors_by_bin)),
    )


def _target(address: str, info: ModelInfo) -> Target:
    return Target(
        address=address,
        model=info.model,
        revision=info.revision,
        family=info.family,
        dtype=info.dtype,
        width=info.width,
        attn_backend=info.attention.backend,
        attn_implementation=info.attention.implementation,
        attn_source=info.attention.source,
        platform=info.platform,
        device_name=info.device_name,
        config_hash=info.config_hash,
        server_version=info.server_version,
    )


def _load(options: LoadOptions, mix: Mix, *, unique: bool) -> Load:
    open_loop = options.rate is not None
    return Load(
        loop="open" if open_loop else "closed",
        concurrency=None if open_loop else options.concurrency,
        rate=options.rate,
        max_outstanding=options.max_outstanding if open_loop else None,
        duration_s=options.duration_s,
        warmup_s=options.warmup_s,
        timeout_s=options.timeout_s,
        seed=options.seed,
        unique=unique,
        mix=mix.shares,
    )


def _requests(run: Run) -> Requests:
    seen = run.recorder
    sent = seen.num_succeeded + seen.num_partly_failed + seen.num_failed + seen.num_unfinished
    return Requests(
        due=sent + seen.num_not_sent,
        sent=sent,
        succeeded=seen.num_succeeded,
        partly_failed=seen.num_partly_failed,
        failed=seen.num_failed,
        unfinished=seen.num_unfinished,
        not_sent=seen.num_not_sent,
    )


def _rates(run: Run) -> Rates:
    seen = run.recorder
    per_s = 1 / seen.window_s if seen.window_s else 0.0
    return Rates(
        requests_per_s=seen.num_requests_ended * per_s,
        images_per_s=seen.num_images * per_s,
        patches_per_s=seen.num_patches * per_s,
        rows_per_s=seen.num_rows * per_s,
        megabytes_per_s=seen.num_bytes / 1e6 * per_s,
        goodput_images_per_s=seen.num_good_images * per_s,
    )


def _stages(run: Run) -> dict[str, Stage]:
    """By the stage's name without its unit: ``decode``, ``forward``, …; empty if no image arrived."""
    spreads = {stage: run.recorder.stages_s[stage].distribution() for stage in STAGES}
    return {
        stage.removesuffix("_s"): Stage(mean_s=spread.mean, p95_s=spread.p95)
        for stage, spread in spreads.items()
        if spread is not None
    }
