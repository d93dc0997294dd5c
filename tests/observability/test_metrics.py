"""What a scrape of a real server says after real requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc
import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import EncoderClient, RequestError
from encoder_svc.observability.catalogue import METRICS
from encoder_svc.observability.definitions import LABEL_VALUES
from tests.observability.scraping import Scrape
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def start(tiny_checkpoint: Callable[[str], Path], port: int) -> Iterator[Callable[..., ServerProcess]]:
    """Starts one server whose metrics are on ``port``."""
    started: list[ServerProcess] = []

    def run(*options: str, wait: bool = True) -> ServerProcess:
        serving = ServerProcess(
            "--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--metrics-port", str(port), *options, wait=wait
        )
        started.append(serving)
        return serving.__enter__()

    yield run
    for serving in started:
        serving.__exit__(None, None, None)


def test_every_metric_of_the_catalogue_is_there_and_nothing_else_of_ours(
    start: Callable[..., ServerProcess], port: int, photos: list[Path]
) -> None:
    with EncoderClient(start().target) as client:
        client.encode(photos)
    scrape = Scrape.of(port)
    ours = {family.name + ("_total" if family.type == "counter" else ""): family for family in scrape.families}
    ours = {name: family for name, family in ours.items() if name.startswith("encoder_")}
    assert ours.keys() == METRICS.keys()
    assert {name: family.type for name, family in ours.items()} == {n: metric.kind for n, metric in METRICS.items()}
    assert scrape.value("process_resident_memory_bytes") > 1e8
    for sample in scrape.samples:
        for label, value in sample.labels.items():
            if label in LABEL_VALUES and sample.name.startswith("encoder_"):
                assert value in LABEL_VALUES[label]


def test_work_is_counted_with_its_sizes(start: Callable[..., ServerProcess], port: int, photos: list[Path]) -> None:
    with EncoderClient(start().target) as client:
        before = Scrape.of(port)
        began_s = time.time()
        images = client.encode(photos)
        client.encode(photos[:2])
    scrape = Scrape.until(port, lambda s: s.value("encoder_requests_total", method="EncodeImages", code="OK") == 2)

    def grown(name: str, **labels: str) -> float:
        return scrape.value(name, **labels) - before.value(name, **labels)

    num_patches = sum(t * h * w for t, h, w in (image.grid_thw for image in images))
    sent_bytes = sum(image.embeddings.nbytes for image in [*images, *images[:2]])
    assert grown("encoder_images_total", outcome="encoded") == len(photos)
    assert grown("encoder_images_total", outcome="cached") == 2
    assert grown("encoder_cache_hits_total") == 2
    assert grown("encoder_cache_misses_total") == len(photos)
    assert grown("encoder_response_bytes_total", transport="stream") == sent_bytes
    assert grown("encoder_request_bytes_total") > sum(photo.stat().st_size for photo in photos)
    assert grown("encoder_batch_patches_sum") == num_patches
    assert grown("encoder_batch_images_sum") == len(photos)
    assert grown("encoder_batches_total", outcome="encoded") == grown("encoder_batch_patches_count")
    assert grown("encoder_request_duration_seconds_count", method="EncodeImages", code="OK") == 2
    assert grown("encoder_time_to_first_embedding_seconds_count", method="EncodeImages") == 2
    for stage in ("admission", "decode_wait", "decode", "resize", "queue", "build", "forward", "collect"):
        assert grown("encoder_stage_duration_seconds_count", stage=stage) >= len(photos)
        assert grown("encoder_stage_duration_seconds_sum", stage=stage) > 0
    busy_s = grown("encoder_device_busy_seconds_total")
    assert 0 < busy_s <= time.time() - began_s
    assert 0 < scrape.value("encoder_device_busy_ratio") <= 1
    assert 0 < scrape.value("encoder_patches_per_second") < 1e7
    assert scrape.value("encoder_cache_bytes") == sum(image.embeddings.nbytes for image in images)
    assert scrape.value("encoder_cache_entries") == len(photos)
    assert began_s - 1 <= scrape.value("encoder_last_progress_timestamp_seconds") <= time.time()
    assert scrape.value("encoder_ready") == 1
    assert scrape.value("encoder_draining") == 0
    for idle in ("requests_running", "queue_patches", "inflight_patches", "inflight_images", "inflight_bytes"):
        assert scrape.value(f"encoder_{idle}") == 0
    assert scrape.value("encoder_batch_in_progress_age_seconds") == 0
    Scrape.until(port, lambda s: s.value("encoder_event_loop_lag_seconds_count") > 5)


@pytest.mark.alone
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_request_of_one_image_is_the_sum_of_its_stages(
    start: Callable[..., ServerProcess], port: int, photos: list[Path], device: str
) -> None:
    """Within 5 %, over requests one after the other: nothing that a user waits for is without a name."""
    serving = start("--cache-bytes", "0", "--device", device)
    with EncoderClient(serving.target) as client:
        client.encode(photos[:1])
        before = Scrape.of(port)
        for photo in photos * 4:
            client.encode([photo])
    num = 4 * len(photos) + 1
    after = Scrape.until(port, lambda s: s.value("encoder_requests_total", method="EncodeImages", code="OK") == num)
    stages_s, total_s = (
        after.value(name, **labels) - before.value(name, **labels)
        for name, labels in (
            ("encoder_stage_duration_seconds_sum", {}),
            ("encoder_request_duration_seconds_sum", {"method": "EncodeImages", "code": "OK"}),
        )
    )
    assert stages_s == pytest.approx(total_s, rel=0.05)
    assert stages_s <= total_s
    if device == "cuda":
        assert after.value("encoder_stage_duration_seconds_sum", stage="h2d") > 0
        assert after.value("encoder_stage_duration_seconds_sum", stage="d2h") > 0


@pytest.mark.alone
def test_the_stages_on_the_wire_add_up_as_well(server: Callable[..., ServerProcess], photos: list[Path]) -> None:
    request = encoder_pb2.EncodeImagesRequest(images=[encoder_pb2.Image(encoded=photos[0].read_bytes())])
    with grpc.insecure_channel(server("qwen2_vl", "--cache-bytes", "0").target) as channel:
        stub = encoder_pb2_grpc.EncoderStub(channel)
        sums_s, totals_s = [], []
        for _ in range(10):
            events = list(stub.EncodeImages(request, timeout=30))
            [timings] = [event.done.timings for event in events if event.WhichOneof("event") == "done"]
            sums_s.append(sum(value for _, value in timings.ListFields()))
            totals_s.append(events[-1].summary.duration_s)
    assert sum(sums_s) == pytest.approx(sum(totals_s), rel=0.05)


def test_refusals_and_failures_are_counted_by_reason(
    start: Callable[..., ServerProcess], port: int, photos: list[Path]
) -> None:
    with EncoderClient(start("--max-images", "2").target) as client:
        with pytest.raises(RequestError, match="REQUEST_TOO_MANY_IMAGES"):
            client.encode(photos)
        with pytest.raises(RequestError, match="REQUEST_EMPTY"):
            client.encode([])
        client.encode([photos[0], photos[1].read_bytes()[:3000]], return_errors=True)
        with pytest.raises(RequestError, match="KEY_UNKNOWN"):
            client.fetch(["0" * 64])
        client.info()
        client.release(["0" * 64])
    scrape = Scrape.until(port, lambda s: s.value("encoder_requests_total", method="ReleaseEmbeddings") == 1)
    too_many = {"method": "EncodeImages", "code": "INVALID_ARGUMENT", "reason": "REQUEST_TOO_MANY_IMAGES"}
    assert scrape.value("encoder_requests_total", **too_many) == 1
    assert scrape.value("encoder_requests_total", method="EncodeImages", reason="REQUEST_EMPTY") == 1
    assert scrape.value("encoder_requests_total", method="EncodeImages", code="OK") == 1
    assert scrape.value("encoder_requests_total", method="FetchEmbeddings", code="OK") == 1
    assert scrape.value("encoder_requests_total", method="GetModelInfo", code="OK") == 1
    assert scrape.value("encoder_image_failures_total", reason="IMAGE_CORRUPT") == 1
    assert scrape.value("encoder_image_failures_total", reason="KEY_UNKNOWN") == 1
    assert scrape.value("encoder_images_total", outcome="failed") == 2
    assert scrape.value("encoder_images_total", outcome="cancelled") == 0


def test_a_call_that_is_cancelled_and_one_out_of_time_are_told_apart(
    start: Callable[..., ServerProcess], port: int, photos: list[Path]
) -> None:
    serving = start("--cache-bytes", "0", "--decode-threads", "1")
    # A trailing byte each, so that no two are shared and the call takes long enough.
    request = encoder_pb2.EncodeImagesRequest(
        images=[encoder_pb2.Image(encoded=photo.read_bytes() + bytes([n])) for photo in photos for n in range(12)]
    )
    with grpc.insecure_channel(serving.target) as channel:
        stub = encoder_pb2_grpc.EncoderStub(channel)
        call = stub.EncodeImages(request)
        next(call)
        call.cancel()
        Scrape.until(port, lambda s: s.value("encoder_requests_total", code="CANCELLED") == 1)
        with pytest.raises(grpc.RpcError):
            list(stub.EncodeImages(request, timeout=0.3))
        scrape = Scrape.until(port, lambda s: s.value("encoder_requests_total", code="DEADLINE_EXCEEDED") == 1)
    assert scrape.value("encoder_requests_total", code="CANCELLED", reason="CANCELLED") == 1
    assert scrape.value("encoder_images_total", outcome="cancelled") > 0


def test_retained_embeddings_show_as_leases_until_they_are_released(
    start: Callable[..., ServerProcess], port: int, photos: list[Path]
) -> None:
    with EncoderClient(start().target) as client:
        [retained] = client.retain(photos[:1])
        leased = Scrape.of(port)
        [fetched] = client.fetch([retained.key])
        client.release([retained.key])
    released = Scrape.until(port, lambda s: s.value("encoder_leases") == 0)
    assert leased.value("encoder_leases") == 1
    assert leased.value("encoder_leased_bytes") == fetched.embeddings.nbytes
    assert released.value("encoder_leased_bytes") == 0
    assert released.value("encoder_images_total", outcome="fetched") == 1
    assert released.value("encoder_response_bytes_total", transport="stream") == fetched.embeddings.nbytes


def test_openmetrics_carries_the_callers_trace_as_an_exemplar(
    start: Callable[..., ServerProcess], port: int, photos: list[Path]
) -> None:
    request = encoder_pb2.EncodeImagesRequest(images=[encoder_pb2.Image(encoded=photos[0].read_bytes())])
    metadata = [("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01")]
    with grpc.insecure_channel(start().target) as channel:
        list(encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request, metadata=metadata))
    Scrape.until(port, lambda s: s.value("encoder_requests_total", method="EncodeImages", code="OK") == 1)
    exemplars = {
        sample.name: sample.exemplar.labels
        for sample in Scrape.of(port, openmetrics=True).samples
        if sample.exemplar is not None
    }
    assert exemplars.keys() == {
        "encoder_request_duration_seconds_bucket",
        "encoder_time_to_first_embedding_seconds_bucket",
        "encoder_stage_duration_seconds_bucket",
    }
    assert all(labels == {"trace_id": TRACE_ID} for labels in exemplars.values())


def test_a_drain_shows_until_it_ends(start: Callable[..., ServerProcess], port: int, photos: list[Path]) -> None:
    serving = start("--cache-bytes", "0", "--drain-s", "20")
    request = encoder_pb2.EncodeImagesRequest(
        images=[encoder_pb2.Image(encoded=photo.read_bytes() + bytes([n])) for photo in photos for n in range(8)]
    )
    with grpc.insecure_channel(serving.target) as channel:
        call = encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request, timeout=60)
        next(call)
        serving.process.terminate()
        # A scrape reads one gauge after the other, and may do so in the very moment in which the drain begins.
        drains = {"encoder_draining": 1, "encoder_ready": 0}
        scrape = Scrape.until(port, lambda s: all(s.value(name) == value for name, value in drains.items()))
        assert scrape.value("encoder_drain_limit_seconds") == 20
        assert 0 <= scrape.value("encoder_draining_seconds") < 20
        for method in ("EncodeImages", "NoSuchMethod"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/encoder.v1.Encoder/{method}")(b"", timeout=10)
        scrape = Scrape.of(port)
        assert scrape.value("encoder_requests_total", method="EncodeImages", code="UNAVAILABLE", reason="DRAINING") == 1
        assert "NoSuchMethod" not in {sample.labels.get("method") for sample in scrape.samples}
        assert len([event for event in call if event.WhichOneof("event") == "summary"]) == 1
    assert serving.process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "source"), [((), "platform"), (("--mm-encoder-attn-backend", "torch_naive"), "override")]
)
def test_build_info_names_the_model_and_the_attention_backend(
    start: Callable[..., ServerProcess], port: int, options: tuple[str, ...], source: str
) -> None:
    serving = start(*options)
    with EncoderClient(serving.target) as client:
        info = client.info()
    scrape = Scrape.of(port)
    [sample] = [sample for sample in scrape.samples if sample.name == "encoder_build_info"]
    assert serving.stop() == 0
    assert sample.value == 1
    assert sample.labels == {
        "version": info.server_version,
        "device": info.device_name,
        "dtype": "float32",
        "model": info.model,
        "revision": info.revision,
        "platform": "cpu",
        "attn_backend": info.attention.backend,
        "attn_implementation": info.attention.implementation,
        "attn_source": source,
    }
