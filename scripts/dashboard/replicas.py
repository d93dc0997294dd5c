"""Which backend runs, and how do replicas compare?"""

from __future__ import annotations

from panels import Query, bars, graph, table
from promql import CALLS, REPLICA, now, quantile, total

BUILD_COLUMNS = (
    *("instance", "version", "model", "revision", "platform", "device", "dtype"),
    *("attn_backend", "attn_implementation", "attn_source"),
)
REPLICAS = (
    table(
        "Which backend runs",
        "One line for each replica; attn_source says who chose: the platform, the operator (override), or promotion.",
        Query(expr=f"encoder_build_info{{{REPLICA}}}", instant=True),
        columns=BUILD_COLUMNS,
    ),
    bars(
        "Request, p95",
        "By replica.",
        Query(
            expr=quantile(0.95, "encoder_request_duration_seconds", CALLS, by="instance"),
            legend="{{instance}}",
            instant=True,
        ),
        unit="s",
    ),
    bars(
        "Images a second",
        "By replica: far apart, the balancing is uneven.",
        Query(
            expr=total("encoder_images_total", 'outcome!~"failed|cancelled"', by="instance"),
            legend="{{instance}}",
            instant=True,
        ),
        unit="short",
    ),
    bars(
        "Pending patches",
        "By replica.",
        Query(expr=now("encoder_inflight_patches", by="instance"), legend="{{instance}}", instant=True),
        unit="short",
    ),
    bars(
        "Memory",
        "Resident, by replica.",
        Query(expr=now("process_resident_memory_bytes", by="instance"), legend="{{instance}}", instant=True),
        unit="bytes",
    ),
    graph(
        "Event loop lag, p99",
        "For so long the process answered nobody.",
        Query(expr=quantile(0.99, "encoder_event_loop_lag_seconds", by="instance"), legend="{{instance}}"),
        unit="s",
    ),
    graph(
        "CPU",
        "Cores in use: decoding, resizing, sending; on a CPU the encoder too.",
        Query(expr=total("process_cpu_seconds_total", by="instance"), legend="{{instance}}"),
        unit="short",
    ),
    graph(
        "Images that failed",
        "By our stable reason; IMAGE_* are the callers' files.",
        Query(expr=total("encoder_image_failures_total", by="reason") + " > 0", legend="{{reason}}"),
        unit="short",
        stacked=True,
    ),
)
