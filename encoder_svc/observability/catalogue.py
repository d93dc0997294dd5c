"""Every metric of the server, in one place. docs/metrics.md is generated from it, and the registry built from it."""

from __future__ import annotations

from typing import Final

from encoder_svc.observability.definitions import (
    BATCH_OUTCOMES,
    IMAGE_OUTCOMES,
    IMAGES_BUCKETS,
    LABEL_VALUES,
    LAG_BUCKETS_S,
    LATENCY_BUCKETS_S,
    PATCHES_BUCKETS,
    RATIO_BUCKETS,
    MetricDefinition,
    MetricGroup,
)


def _labels(*names: str) -> dict[str, tuple[str, ...] | None]:
    return {name: LABEL_VALUES[name] for name in names}


_REQUESTS = MetricGroup(
    title="Are users waiting?",
    metrics=(
        MetricDefinition(
            name="encoder_requests_total",
            kind="counter",
            unit="requests",
            labels=_labels("method", "code", "reason"),
            meaning="Calls that ended, by gRPC status and, where one was refused or failed, by our stable reason.",
            when_it_moves="RESOURCE_EXHAUSTED: add replicas or send less. UNAVAILABLE: a replica starts, drains or is "
            "broken. INTERNAL: read the log, something is at fault. INVALID_ARGUMENT: a caller is.",
        ),
        MetricDefinition(
            name="encoder_request_duration_seconds",
            kind="histogram",
            unit="seconds",
            labels=_labels("method", "code"),
            buckets=LATENCY_BUCKETS_S,
            meaning="From a call's arrival to the end of its answer.",
            when_it_moves="Look at the stages: `queue` or `decode_wait` want replicas or threads, `forward` a faster "
            "backend or smaller images, `send` a caller that reads faster.",
        ),
        MetricDefinition(
            name="encoder_time_to_first_embedding_seconds",
            kind="histogram",
            unit="seconds",
            labels={"method": ("EncodeImages", "FetchEmbeddings")},
            buckets=LATENCY_BUCKETS_S,
            meaning="From a call's arrival until its first image was written whole.",
            when_it_moves="As the request's duration. Far below it: requests hold many images.",
        ),
        MetricDefinition(
            name="encoder_stage_duration_seconds",
            kind="histogram",
            unit="seconds",
            labels=_labels("stage"),
            buckets=LATENCY_BUCKETS_S,
            meaning="Time of one image in one stage; the stages of an image follow each other without a gap.",
            when_it_moves="The stage that grew says where the milliseconds went; the table of stages below says what "
            "each is.",
        ),
        MetricDefinition(
            name="encoder_requests_running",
            kind="gauge",
            unit="requests",
            meaning="Calls that are being answered.",
            when_it_moves="Rises with load. High while nothing is pending: callers read slowly.",
        ),
    ),
)

_IMAGES = MetricGroup(
    title="How much is done?",
    metrics=(
        MetricDefinition(
            name="encoder_images_total",
            kind="counter",
            unit="images",
            labels={"outcome": IMAGE_OUTCOMES},
            meaning="Images of admitted calls by what became of them: `encoded` on the device, found `cached`, "
            "`shared` with another caller's, `fetched` by key, `failed`, or `cancelled` with their call.",
            when_it_moves="`failed`: encoder_image_failures_total says why. `cancelled`: callers' timeouts are short, "
            "or the service is slow.",
        ),
        MetricDefinition(
            name="encoder_image_failures_total",
            kind="counter",
            unit="images",
            labels=_labels("reason"),
            meaning="Images that failed by themselves, in calls that went on, by our stable reason.",
            when_it_moves="IMAGE_*: a caller sends broken or oversized files. DEVICE_*, ENCODER_FAILED, "
            "OUTPUT_NOT_FINITE: the device, the kernel or the checkpoint is at fault. LEASE_BYTES_EXHAUSTED: callers "
            "retain and do not release, or `--max-leased-bytes` is low.",
        ),
        MetricDefinition(
            name="encoder_request_bytes_total",
            kind="counter",
            unit="bytes",
            meaning="Bytes of admitted EncodeImages requests.",
            when_it_moves="Callers could send smaller images: the model resizes them anyway.",
        ),
        MetricDefinition(
            name="encoder_response_bytes_total",
            kind="counter",
            unit="bytes",
            labels=_labels("transport"),
            meaning="Bytes of embeddings that left, by how they travelled.",
            when_it_moves="Near the network's rate: put the LM on the same host, or retain and fetch.",
        ),
    ),
)

_QUEUE = MetricGroup(
    title="When is a replica to be added?",
    metrics=(
        MetricDefinition(
            name="encoder_predicted_queue_delay_seconds",
            kind="gauge",
            unit="seconds",
            meaning="How long all that is pending takes at the least, by the measured rate; 0 until one is known.",
            when_it_moves="Stays above the latency that users accept: add a replica.",
        ),
        MetricDefinition(
            name="encoder_patches_per_second",
            kind="gauge",
            unit="patches per second",
            meaning="The rate that admission predicts by: patches that left over the time in which any were pending, "
            "mostly of the last ten seconds.",
            when_it_moves="Drops under load: the device is throttled or shared, or images became cheaper to encode "
            "than to decode.",
        ),
        MetricDefinition(
            name="encoder_queue_patches",
            kind="gauge",
            unit="patches",
            meaning="Patches that wait for the device, decoded.",
            when_it_moves="Scale on the sum over replicas. Zero under load: decoding is the limit, not the device.",
        ),
        MetricDefinition(
            name="encoder_queue_images",
            kind="gauge",
            unit="images",
            meaning="Images that wait for the device, decoded.",
            when_it_moves="As encoder_queue_patches.",
        ),
        MetricDefinition(
            name="encoder_inflight_patches",
            kind="gauge",
            unit="patches",
            meaning="Patches that are pending, from admission until their image is sent.",
            when_it_moves="Near its limit: requests are about to be refused with QUEUE_FULL.",
        ),
        MetricDefinition(
            name="encoder_inflight_patches_limit",
            kind="gauge",
            unit="patches",
            meaning="The bound on encoder_inflight_patches (`--max-queued-patches`).",
            when_it_moves="Only with the configuration.",
        ),
        MetricDefinition(
            name="encoder_inflight_images",
            kind="gauge",
            unit="images",
            meaning="Images that are pending, from admission until they are sent.",
            when_it_moves="Near its limit: requests are about to be refused with INFLIGHT_IMAGES.",
        ),
        MetricDefinition(
            name="encoder_inflight_images_limit",
            kind="gauge",
            unit="images",
            meaning="The bound on encoder_inflight_images (`--max-inflight-images`).",
            when_it_moves="Only with the configuration.",
        ),
        MetricDefinition(
            name="encoder_inflight_bytes",
            kind="gauge",
            unit="bytes",
            meaning="Bytes of the requests that are pending.",
            when_it_moves="Near its limit: requests are about to be refused with INFLIGHT_BYTES.",
        ),
        MetricDefinition(
            name="encoder_inflight_bytes_limit",
            kind="gauge",
            unit="bytes",
            meaning="The bound on encoder_inflight_bytes (`--max-inflight-bytes`).",
            when_it_moves="Only with the configuration.",
        ),
        MetricDefinition(
            name="encoder_decoded_bytes",
            kind="gauge",
            unit="bytes",
            meaning="Memory that images take which are being decoded, and decoded pixels that wait for a device that "
            "resizes them (`--image-processing device`).",
            when_it_moves="Near its limit: images wait to be decoded until others are, or the device has taken them.",
        ),
        MetricDefinition(
            name="encoder_decoded_bytes_limit",
            kind="gauge",
            unit="bytes",
            meaning="The bound on encoder_decoded_bytes (`--max-decoded-bytes`).",
            when_it_moves="Only with the configuration.",
        ),
    ),
)

_DEVICE = MetricGroup(
    title="Is the device full or idle?",
    metrics=(
        MetricDefinition(
            name="encoder_device_busy_seconds_total",
            kind="counter",
            unit="seconds",
            meaning="Time that the device spent in forward passes; by device events on a GPU.",
            when_it_moves="Its rate is the duty cycle. Low while users wait: decoding, the network or the callers hold "
            "it up.",
        ),
        MetricDefinition(
            name="encoder_device_busy_ratio",
            kind="gauge",
            unit="ratio",
            meaning="The share of the last 15 s or so that the device spent in forward passes, 0 to 1. For a look "
            "without Prometheus; elsewhere take the rate of encoder_device_busy_seconds_total.",
            when_it_moves="Near 1: the device is full. Do not scale on it: it says nothing about who waits.",
        ),
        MetricDefinition(
            name="encoder_batches_total",
            kind="counter",
            unit="batches",
            labels={"outcome": BATCH_OUTCOMES},
            meaning="Batches that the device was given, by how they ended. One that failed is run again in parts.",
            when_it_moves="`out_of_memory`: lower `--max-batch-patches`. `failed`, `hung`: read the log, then the "
            "runbook.",
        ),
        MetricDefinition(
            name="encoder_batch_patches",
            kind="histogram",
            unit="patches",
            buckets=PATCHES_BUCKETS,
            meaning="Patches in a batch. The rate of its sum is the device's throughput.",
            when_it_moves="Small batches under load: images come one at a time; raise the decode threads.",
        ),
        MetricDefinition(
            name="encoder_batch_images",
            kind="histogram",
            unit="images",
            buckets=IMAGES_BUCKETS,
            meaning="Images in a batch.",
            when_it_moves="As encoder_batch_patches.",
        ),
        MetricDefinition(
            name="encoder_batch_padding_ratio",
            kind="histogram",
            unit="ratio",
            buckets=RATIO_BUCKETS,
            meaning="The share of a batch's rows on the device that are padding, 0 to 1; 0 for packed batches.",
            when_it_moves="High: the device works for nothing; its graphs' sizes do not fit the traffic.",
        ),
        MetricDefinition(
            name="encoder_batch_in_progress_age_seconds",
            kind="gauge",
            unit="seconds",
            meaning="For how long the oldest batch has been with the device; 0 if there is none.",
            when_it_moves="Grows without end: the device hangs. At `--watchdog-s` the replica gives up and exits.",
        ),
        MetricDefinition(
            name="encoder_last_progress_timestamp_seconds",
            kind="gauge",
            unit="seconds since 1970",
            meaning="When a batch last came back from the device.",
            when_it_moves="Stands still while patches are queued: nothing gets through; see the runbook.",
        ),
    ),
)

_CACHE = MetricGroup(
    title="What does the cache save?",
    metrics=(
        MetricDefinition(
            name="encoder_cache_hits_total",
            kind="counter",
            unit="images",
            meaning="Images whose embeddings were there.",
            when_it_moves="Hits over hits and misses is the share of work saved.",
        ),
        MetricDefinition(
            name="encoder_cache_misses_total",
            kind="counter",
            unit="images",
            meaning="Images whose embeddings were not there.",
            when_it_moves="With evictions: the cache is too small. Without: images do not repeat on this replica.",
        ),
        MetricDefinition(
            name="encoder_cache_evictions_total",
            kind="counter",
            unit="images",
            meaning="Embeddings pushed out to make room.",
            when_it_moves="Steady evictions with few hits: raise `--cache-bytes`, or send equal images to one replica.",
        ),
        MetricDefinition(
            name="encoder_cache_bytes",
            kind="gauge",
            unit="bytes",
            meaning="Embeddings that are cached and not leased, and those that had to go but are still being read.",
            when_it_moves="Fills up to its limit and stays there.",
        ),
        MetricDefinition(
            name="encoder_cache_bytes_limit",
            kind="gauge",
            unit="bytes",
            meaning="The bound on encoder_cache_bytes (`--cache-bytes`).",
            when_it_moves="Only with the configuration.",
        ),
        MetricDefinition(
            name="encoder_cache_entries",
            kind="gauge",
            unit="images",
            meaning="Images whose embeddings are kept, leased ones included.",
            when_it_moves="With encoder_cache_bytes.",
        ),
        MetricDefinition(
            name="encoder_leases",
            kind="gauge",
            unit="images",
            meaning="Images whose embeddings are retained for another process to fetch.",
            when_it_moves="Grows steadily: callers retain and never release.",
        ),
        MetricDefinition(
            name="encoder_leased_bytes",
            kind="gauge",
            unit="bytes",
            meaning="Embeddings that are retained, and those whose lease ended, kept nowhere but still being read.",
            when_it_moves="Near its limit: images are about to fail with LEASE_BYTES_EXHAUSTED. Release sooner, or "
            "lease for less.",
        ),
        MetricDefinition(
            name="encoder_leased_bytes_limit",
            kind="gauge",
            unit="bytes",
            meaning="The bound on encoder_leased_bytes (`--max-leased-bytes`).",
            when_it_moves="Only with the configuration.",
        ),
    ),
)

_PROCESS = MetricGroup(
    title="Is the replica well?",
    metrics=(
        MetricDefinition(
            name="encoder_ready",
            kind="gauge",
            unit="0 or 1",
            meaning="1 while requests are taken; 0 while the model is loaded, on drain, and once the device is broken.",
            when_it_moves="0 without a roll-out: read the log; the checkpoint, the device or the drain is the cause.",
        ),
        MetricDefinition(
            name="encoder_start_seconds",
            kind="gauge",
            unit="seconds",
            labels=_labels("phase"),
            meaning="How long each phase of the start took, from the start of the process until it served; phases "
            "follow each other, and together are the whole. Not there before that.",
            when_it_moves="`attention`, `operations` and `graphs` far above other replicas': kernels were compiled; "
            "keep `--kernel-cache-dir` on a volume. `weights`, `checkpoint`: the disk or a download.",
        ),
        MetricDefinition(
            name="encoder_draining",
            kind="gauge",
            unit="0 or 1",
            meaning="1 while running requests are let finish before the process ends.",
            when_it_moves="With every roll-out and scale-down.",
        ),
        MetricDefinition(
            name="encoder_draining_seconds",
            kind="gauge",
            unit="seconds",
            meaning="For how long the replica has been draining; 0 if it is not.",
            when_it_moves="Near `--drain-s`: requests are about to be cut short.",
        ),
        MetricDefinition(
            name="encoder_drain_limit_seconds",
            kind="gauge",
            unit="seconds",
            meaning="The bound on encoder_draining_seconds (`--drain-s`).",
            when_it_moves="Only with the configuration.",
        ),
        MetricDefinition(
            name="encoder_frontend_restarts_total",
            kind="counter",
            unit="processes",
            meaning="Front ends that ended by themselves; another was started in the place of each.",
            when_it_moves="A front end crashed, or was killed for its memory: its log's last lines say which.",
        ),
        MetricDefinition(
            name="encoder_event_loop_lag_seconds",
            kind="histogram",
            unit="seconds",
            buckets=LAG_BUCKETS_S,
            meaning="How late a timer of 50 ms fired: for so long the event loop answered nobody.",
            when_it_moves="Above 5 ms: the process is short of CPU, or something blocks the loop; give it cores, then "
            "report it.",
        ),
        MetricDefinition(
            name="encoder_build_info",
            kind="gauge",
            unit="always 1",
            labels=dict.fromkeys(
                (
                    *("version", "model", "revision", "platform", "device", "dtype"),
                    *("attn_backend", "attn_implementation", "attn_source"),
                )
            ),
            meaning="What this replica serves and with which attention backend; `attn_source` says who chose it.",
            when_it_moves="Replicas differ: a roll-out is under way, or machines are not alike.",
        ),
    ),
)

GROUPS: Final = (_REQUESTS, _IMAGES, _QUEUE, _DEVICE, _CACHE, _PROCESS)
METRICS: Final = {metric.name: metric for group in GROUPS for metric in group.metrics}
"""Every metric by its name."""
