"""Are users waiting, where do the milliseconds go, how much is done?"""

from __future__ import annotations

from panels import Query, graph, number
from promql import CALLS, now, quantile, rate, total


def quantiles(histogram: str, labels: str = "") -> tuple[Query, ...]:
    return tuple(Query(expr=quantile(q, histogram, labels), legend=f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99))


WAITING = (
    number(
        "Requests",
        "EncodeImages calls a second.",
        total("encoder_requests_total", 'method="EncodeImages"'),
        unit="reqps",
    ),
    number(
        "Request, p95",
        "EncodeImages, of those that succeed.",
        quantile(0.95, "encoder_request_duration_seconds", CALLS),
        unit="s",
        warn=1,
    ),
    number(
        "First embedding, p95",
        "Until a call's first image was written.",
        quantile(0.95, "encoder_time_to_first_embedding_seconds", 'method="EncodeImages"'),
        unit="s",
        warn=1,
    ),
    number(
        "Not OK",
        "Calls that were refused or failed.",
        total("encoder_requests_total", 'code!="OK"'),
        unit="reqps",
        warn=1,
    ),
    number(
        "Predicted delay",
        "The fullest replica.",
        now("encoder_predicted_queue_delay_seconds", "max"),
        unit="s",
        warn=0.5,
    ),
    number(
        "Images",
        "Images a second.",
        total("encoder_images_total", 'outcome=~"encoded|cached|shared|fetched"'),
        unit="short",
    ),
    number(
        "Device duty", "Mean of the replicas.", f"avg ({rate('encoder_device_busy_seconds_total')})", unit="percentunit"
    ),
    number("Ready", "Replicas that take requests.", now("encoder_ready"), unit="none", warn=1, worse="below"),
    graph(
        "Request latency",
        "EncodeImages calls that succeed, from arrival to the end of the answer.",
        *quantiles("encoder_request_duration_seconds", CALLS),
        unit="s",
    ),
    graph(
        "Time to the first embedding",
        "EncodeImages calls, until their first image was written whole.",
        *quantiles("encoder_time_to_first_embedding_seconds", 'method="EncodeImages"'),
        unit="s",
    ),
    graph(
        "Calls by method and status",
        "All calls that ended.",
        Query(expr=total("encoder_requests_total", by="method, code"), legend="{{method}} {{code}}"),
        unit="reqps",
    ),
)
MILLISECONDS = (
    graph(
        "Latency by stage, mean of an image",
        "The stages follow each other without a gap: their sum is an image's mean time in the service.",
        Query(
            expr=f"{total('encoder_stage_duration_seconds_sum', by='stage')} / ignoring (stage) group_left "
            + total("encoder_stage_duration_seconds_count", 'stage="admission"'),
            legend="{{stage}}",
        ),
        unit="s",
        width=12,
        stacked=True,
    ),
    graph(
        "Stages, p95 each",
        "Of the images that passed the stage. Quantiles do not add up.",
        Query(expr=quantile(0.95, "encoder_stage_duration_seconds", by="stage"), legend="{{stage}}"),
        unit="s",
        width=12,
    ),
)
DONE = (
    graph(
        "Images by outcome",
        "encoded on the device, found cached, shared with another caller's, fetched by key, failed, or cancelled.",
        Query(expr=total("encoder_images_total", by="outcome"), legend="{{outcome}}"),
        unit="short",
        stacked=True,
    ),
    graph(
        "Patches through the device",
        "The unit of cost, a second.",
        Query(expr=total("encoder_batch_patches_sum"), legend="patches/s"),
        unit="short",
    ),
    graph(
        "Bytes by transport",
        "Embeddings that left, by how they travelled; and requests that came in.",
        Query(expr=total("encoder_response_bytes_total", by="transport"), legend="out: {{transport}}"),
        Query(expr=total("encoder_request_bytes_total"), legend="in"),
        unit="Bps",
    ),
)
