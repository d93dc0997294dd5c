"""What a scrape reads of a running server, by the metric's name. Read in the scrape's thread: numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.engine.admission import Admission
    from encoder_svc.server.local_core import LocalCore
    from encoder_svc.server.window import Window


def core_gauges(core: LocalCore) -> dict[str, Callable[[], float]]:
    """Queues, budgets, device and cache of a loaded model."""
    admission, engine, store = core.admission, core.engine, core.store
    budgets, watch = admission.budgets, engine.watch
    return {
        "encoder_predicted_queue_delay_seconds": lambda: _drain_time_s(admission),
        "encoder_patches_per_second": lambda: admission.meter.patches_per_s or 0.0,
        "encoder_queue_patches": lambda: engine.queued_patches,
        "encoder_queue_images": lambda: engine.queued_images,
        "encoder_inflight_patches": lambda: admission.pending_patches,
        "encoder_inflight_patches_limit": lambda: budgets.max_queued_patches,
        "encoder_inflight_images": lambda: admission.pending_images,
        "encoder_inflight_images_limit": lambda: budgets.max_inflight_images,
        "encoder_inflight_bytes": lambda: admission.pending_bytes,
        "encoder_inflight_bytes_limit": lambda: budgets.max_inflight_bytes,
        "encoder_device_busy_ratio": lambda: watch.busy_ratio,
        "encoder_batch_in_progress_age_seconds": lambda: watch.batch_age_s,
        "encoder_last_progress_timestamp_seconds": lambda: watch.last_progress_s,
        "encoder_cache_hits_total": lambda: store.stats.hits,
        "encoder_cache_misses_total": lambda: store.stats.misses,
        "encoder_cache_evictions_total": lambda: store.stats.evictions,
        "encoder_cache_bytes": lambda: store.stats.cached_bytes,
        "encoder_cache_bytes_limit": lambda: store.max_bytes,
        "encoder_cache_entries": lambda: store.stats.num_entries,
        "encoder_leases": lambda: store.stats.num_leased,
        "encoder_leased_bytes": lambda: store.stats.leased_bytes,
        "encoder_leased_bytes_limit": lambda: store.max_leased_bytes,
    }


def decoded_gauges(decoded: Window) -> dict[str, Callable[[], float]]:
    """Pixels that wait for the device."""
    return {
        "encoder_decoded_bytes": lambda: decoded.held,
        "encoder_decoded_bytes_limit": lambda: decoded.size,
    }


def _drain_time_s(admission: Admission) -> float:
    """How long all that is pending takes at the least; 0 while no rate is known."""
    return admission.meter.least_s(admission.pending_patches)
