"""Embeddings that wait for whoever fetches them: leases, fetches and releases on a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import AsyncEncoderClient, EncoderClient, InvalidInputError, NotFoundError, OverloadedError
from tests.serving import ENVIRONMENT

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.message import Message


def noise(side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


FETCH = """
import json, sys
from encoder_svc.client import EncoderClient, NotFoundError
with EncoderClient(sys.argv[1]) as client:
    client.info()
    print("ready", flush=True)
    try:
        [image] = client.fetch([input()])
        print(json.dumps({"sum": float(image.embeddings.sum()), "grid": image.grid_thw}))
    except NotFoundError as error:
        print(json.dumps({"reason": error.reason}))
"""


class AnotherProcess:
    """Fetches once it is told what."""

    def __init__(self, target: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FETCH, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def until_ready(self) -> Self:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def fetch(self, key: str) -> dict:
        answer, _ = self._process.communicate(key + "\n", timeout=30)
        return json.loads(answer)


def test_one_process_encodes_another_fetches_and_a_third_is_too_late(server, photos: list[Path]) -> None:
    target = server("qwen3_vl", "--cache-bytes", "0").target
    second, third, fourth = [one.until_ready() for one in [AnotherProcess(target) for _ in range(3)]]
    with EncoderClient(target) as client:
        [streamed] = client.encode(photos[:1])
        [retained] = client.retain(photos[:1], lease_s=2)
        retained_at_s = time.monotonic()
        assert retained.key == streamed.content_key
        assert (retained.grid_thw, retained.rows, retained.width) == (streamed.grid_thw, *streamed.embeddings.shape)
        fetched = second.fetch(retained.key)
        assert tuple(fetched["grid"]) == streamed.grid_thw
        assert fetched["sum"] == pytest.approx(float(streamed.embeddings.sum()), rel=1e-3)
        time.sleep(max(0.0, retained_at_s + 2.1 - time.monotonic()))
    assert third.fetch(retained.key) == {"reason": "KEY_EXPIRED"}
    assert fourth.fetch("0" * 64) == {"reason": "KEY_UNKNOWN"}


def test_a_retained_answer_has_no_chunks(server, photos: list[Path]) -> None:
    with grpc.insecure_channel(server("qwen2_vl").target) as channel:
        request = encoder_pb2.EncodeImagesRequest(
            images=[encoder_pb2.Image(encoded=photos[0].read_bytes())], delivery=encoder_pb2.DELIVERY_RETAIN
        )
        events = [r.WhichOneof("event") for r in encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request)]
    assert events == ["header", "done", "summary"]


def test_a_released_key_is_gone_and_can_be_released_once(server) -> None:
    with EncoderClient(server("qwen2_vl").target) as client:
        [retained] = client.retain([noise(100, 20)])
        assert client.fetch([retained.key])[0].embeddings.any()
        assert client.release([retained.key, "f" * 64]) == 1
        with pytest.raises(NotFoundError):
            client.fetch([retained.key])
        assert client.release([retained.key]) == 0


@pytest.mark.parametrize(
    ("num_keys", "why"),
    [(0, "The request holds no key; send at least one."), (65, "The request holds 65 keys; at most 64 are taken.")],
)
@pytest.mark.parametrize("call", ["fetch", "release"])
def test_no_keys_and_too_many_keys_are_refused(server, call: str, num_keys: int, why: str) -> None:
    with EncoderClient(server("qwen2_vl").target) as client, pytest.raises(InvalidInputError, match=why):
        getattr(client, call)(["0" * 64] * num_keys)


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("EncodeImages", encoder_pb2.EncodeImagesRequest(), "images"),
        ("FetchEmbeddings", encoder_pb2.FetchEmbeddingsRequest(), "keys"),
        ("FetchEmbeddings", encoder_pb2.FetchEmbeddingsRequest(keys=["0"], request_id="x" * 257), "request_id"),
        ("ReleaseEmbeddings", encoder_pb2.ReleaseEmbeddingsRequest(), "keys"),
        (
            "EncodeImages",
            encoder_pb2.EncodeImagesRequest(delivery=encoder_pb2.DELIVERY_RETAIN, lease_s=-1, images=[{}]),
            "lease_s",
        ),
    ],
)
def test_the_field_that_is_wrong_is_named(server, call: str, request_: Message, field: str) -> None:
    with grpc.insecure_channel(server("qwen2_vl").target) as channel:
        method = getattr(encoder_pb2_grpc.EncoderStub(channel), call)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(request_))
    bad = error_details_pb2.BadRequest()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert status.details[1].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [field]


def test_more_than_may_be_retained_is_refused(server) -> None:
    with EncoderClient(server("qwen2_vl", "--max-leased-bytes", "20000").target) as client:
        client.retain([noise(196, 6)], lease_s=30)
        with pytest.raises(OverloadedError) as caught:
            client.retain([noise(196, 7)])
        assert caught.value.reason == "LEASE_BYTES_EXHAUSTED"
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 30
        # The lease that holds the room is not evicted by images that are merely encoded.
        client.encode([noise(196, seed) for seed in range(8, 12)])


def test_what_can_never_be_retained_is_refused_with_no_delay(server) -> None:
    target = server("qwen2_vl", "--max-leased-bytes", "100").target
    with EncoderClient(target) as client, pytest.raises(OverloadedError) as caught:
        client.retain([noise(196, 6)])
    assert (caught.value.reason, caught.value.retry_after_s) == ("LEASE_BYTES_EXHAUSTED", None)


@pytest.mark.parametrize("lease_s", [-1.0, 601.0, float("nan"), float("inf")])
def test_a_lease_out_of_bounds_is_refused(server, photos: list[Path], lease_s: float) -> None:
    with EncoderClient(server("qwen2_vl").target) as client, pytest.raises(InvalidInputError) as caught:
        client.retain(photos[:1], lease_s=lease_s)
    assert caught.value.reason == "LEASE_INVALID"
    assert (
        caught.value.message
        == f"lease_s is {lease_s:g}; send above 0 and at most 600 seconds, or 0 for the server's 60."
    )


def test_a_lease_of_0_is_the_server_s_default(server, photos: list[Path]) -> None:
    target = server("qwen2_vl", "--lease-s", "1", "--cache-bytes", "0").target
    with EncoderClient(target) as client:
        [retained] = client.retain(photos[:1], lease_s=0)
        assert client.fetch([retained.key])
        time.sleep(1.1)
        with pytest.raises(NotFoundError) as caught:
            client.fetch([retained.key])
    assert caught.value.reason == "KEY_EXPIRED"


async def test_a_fetch_waits_for_an_image_that_is_still_being_encoded(server) -> None:
    image = noise(1500, 13)
    target = server("qwen2_vl", "--max-pixels", "4000000").target
    key = content_key(target, image)
    async with AsyncEncoderClient(target) as client:
        retaining = asyncio.create_task(client.retain([image]))
        await asyncio.sleep(0.3)
        assert not retaining.done()
        fetched = await client.fetch([key])
        [retained] = await retaining
    assert retained.key == key
    assert fetched[0].embeddings.any()


def content_key(target: str, image: np.ndarray) -> str:
    """The key that the server will give a raw image, worked out as it does."""
    from encoder_svc.cache.keys import ContentKeys

    with EncoderClient(target) as client:
        info = client.info()
    keys = ContentKeys(info.config_hash, info.processor.hash)
    height, width, _ = image.shape
    return keys.key((b"raw-rgb", str(height).encode(), str(width).encode(), image.tobytes()))
