"""When is a replica to be added, is the device full or idle, what does the cache save?"""

from __future__ import annotations

from panels import Query, graph
from promql import REPLICA, mean, now, quantile, rate, ratio, total

REPLICAS_WANTED = (
    graph(
        "Queue",
        "Patches decoded and waiting; all that is pending; and the bound at which requests are refused.",
        Query(expr=now("encoder_queue_patches"), legend="queued for the device"),
        Query(expr=now("encoder_inflight_patches"), legend="pending"),
        Query(expr=now("encoder_inflight_patches_limit"), legend="limit"),
        unit="short",
        width=6,
        dashed="limit",
    ),
    graph(
        "Predicted delay",
        "How long all that is pending takes at the measured rate. Above what users accept: add a replica.",
        Query(expr=now("encoder_predicted_queue_delay_seconds", "max"), legend="fullest replica"),
        Query(expr=now("encoder_predicted_queue_delay_seconds", "avg"), legend="mean"),
        unit="s",
        width=6,
    ),
    graph(
        "Budgets",
        "The fullest replica's share of each bound; at 100 % requests are refused.",
        *(
            Query(expr=f"max ({used}{{{REPLICA}}} / {used}_limit{{{REPLICA}}})", legend=legend)
            for used, legend in (
                ("encoder_inflight_patches", "patches"),
                ("encoder_inflight_images", "images"),
                ("encoder_inflight_bytes", "bytes"),
                ("encoder_leased_bytes", "leased bytes"),
            )
        ),
        unit="percentunit",
        width=6,
    ),
    graph(
        "Refusals by reason",
        "Calls that did not succeed, by our stable reason (docs/wire.md).",
        Query(expr=total("encoder_requests_total", 'code!="OK"', by="reason") + " > 0", legend="{{reason}}"),
        unit="reqps",
        width=6,
        stacked=True,
    ),
)
DEVICE = (
    graph(
        "Device duty",
        "The share of time in forward passes. Near 100 %: full. Low while users wait: something else holds it up.",
        Query(expr=f"sum by (instance) ({rate('encoder_device_busy_seconds_total')})", legend="{{instance}}"),
        unit="percentunit",
        width=6,
    ),
    graph(
        "Batch size",
        "Patches in a batch.",
        Query(expr=mean("encoder_batch_patches"), legend="mean"),
        Query(expr=quantile(0.95, "encoder_batch_patches"), legend="p95"),
        unit="short",
        width=6,
    ),
    graph(
        "Images in a batch",
        "One at a time under load: decoding is the limit.",
        Query(expr=mean("encoder_batch_images"), legend="mean"),
        Query(expr=quantile(0.95, "encoder_batch_images"), legend="p95"),
        unit="short",
        width=6,
    ),
    graph(
        "Padding and failed batches",
        "Rows that the device computes for nothing, as a share of a batch; batches that did not succeed.",
        Query(expr=mean("encoder_batch_padding_ratio"), legend="padding"),
        Query(
            expr=total("encoder_batches_total", 'outcome!="encoded"') + " / " + total("encoder_batches_total"),
            legend="failed",
        ),
        unit="percentunit",
        width=6,
    ),
)
CACHE = (
    graph(
        "Cache hit ratio",
        "The share of look-ups that saved the work.",
        Query(expr=ratio("encoder_cache_hits_total", "encoder_cache_misses_total"), legend="hits"),
        unit="percentunit",
    ),
    graph(
        "Cache and leases",
        "Embeddings that are kept.",
        Query(expr=now("encoder_cache_bytes"), legend="cached"),
        Query(expr=now("encoder_leased_bytes"), legend="leased"),
        Query(expr=now("encoder_cache_bytes_limit"), legend="cache limit"),
        unit="bytes",
        dashed=".*limit",
    ),
    graph(
        "Evictions",
        "Embeddings pushed out to make room, a second.",
        Query(expr=total("encoder_cache_evictions_total"), legend="evictions"),
        unit="short",
    ),
)
