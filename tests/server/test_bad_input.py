"""What is wrong with the input is said with a stable status and reason, and the server goes on serving."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import EncoderClient, InvalidInputError, OverloadedError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.serving import ServerProcess

PATCH_DIM = 3 * 2 * 14 * 14


@pytest.fixture
def small(server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with limits low enough to run into."""
    return server("qwen2_5_vl", "--max-images", "4", "--max-request-bytes", "2MiB", "--max-request-patches", "4000")


@pytest.fixture(autouse=True)
def _alive_afterwards(small: ServerProcess, photos: list[Path]):
    yield
    with EncoderClient(small.target) as client:
        assert client.encode(photos[:1])[0].embeddings.any()
    assert small.process.poll() is None


def png_header(width: int, height: int) -> bytes:
    """A PNG file that declares a size and holds no pixels."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [ihdr, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def photo_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def raw(height: int, width: int, num_bytes: int) -> encoder_pb2.Image:
    return encoder_pb2.Image(raw=encoder_pb2.RawImage(height=height, width=width, data=bytes(num_bytes)))


def values(t: int, h: int, w: int, rows: int, dtype: int = encoder_pb2.DTYPE_FLOAT32) -> encoder_pb2.Image:
    grid = encoder_pb2.GridThw(t=t, h=h, w=w)
    data = bytes(rows * PATCH_DIM * 4)
    return encoder_pb2.Image(pixel_values=encoder_pb2.PixelValues(grid_thw=grid, dtype=dtype, data=data))


def nan_values() -> encoder_pb2.Image:
    data = np.full((4, PATCH_DIM), np.nan, np.float32).tobytes()
    grid = encoder_pb2.GridThw(t=1, h=2, w=2)
    return encoder_pb2.Image(
        pixel_values=encoder_pb2.PixelValues(grid_thw=grid, dtype=encoder_pb2.DTYPE_FLOAT32, data=data)
    )


BAD_IMAGES = {
    "truncated JPEG": (encoder_pb2.Image(encoded=photo_bytes()[:5000]), "IMAGE_CORRUPT"),
    "not an image": (encoder_pb2.Image(encoded=b"just some text, and then some more"), "IMAGE_FORMAT"),
    "a GIF": (encoder_pb2.Image(encoded=b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"), "IMAGE_FORMAT"),
    "no bytes": (encoder_pb2.Image(encoded=b""), "IMAGE_MISSING"),
    "no source": (encoder_pb2.Image(), "IMAGE_MISSING"),
    "bomb": (encoder_pb2.Image(encoded=png_header(60_000, 60_000)), "IMAGE_PIXELS"),
    "long side": (encoder_pb2.Image(encoded=png_header(40_000, 1_000)), "IMAGE_SIDE"),
    "many pixels": (encoder_pb2.Image(encoded=png_header(9_000, 9_000)), "IMAGE_PIXELS"),
    "aspect 300:1": (encoder_pb2.Image(encoded=png(300, 1)), "IMAGE_ASPECT_RATIO"),
    "raw without sides": (raw(0, 10, 0), "IMAGE_SIDE"),
    "raw too short": (raw(10, 10, 299), "RAW_SIZE"),
    "raw too long": (raw(10, 10, 301), "RAW_SIZE"),
    "grid with fewer rows": (values(1, 4, 4, rows=12), "GRID_MISMATCH"),
    "grid with more rows": (values(1, 2, 2, rows=8), "GRID_MISMATCH"),
    "zero grid": (values(0, 4, 4, rows=0), "GRID_INVALID"),
    "negative grid": (values(1, -4, -4, rows=16), "GRID_INVALID"),
    "odd grid": (values(1, 3, 4, rows=12), "GRID_INVALID"),
    "huge grid": (values(2**31 - 1, 2, 2, rows=4), "REQUEST_TOO_MANY_PATCHES"),
    "no dtype": (values(1, 2, 2, rows=4, dtype=encoder_pb2.DTYPE_UNSPECIFIED), "DTYPE_UNSUPPORTED"),
    "unknown dtype": (values(1, 2, 2, rows=4, dtype=77), "DTYPE_UNSUPPORTED"),
    "NaN": (nan_values(), "PIXEL_VALUES_NOT_FINITE"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_fails_alone_with_its_reason(small: ServerProcess, case: str, photos: list[Path]) -> None:
    image, reason = BAD_IMAGES[case]
    good = encoder_pb2.Image(encoded=photos[0].read_bytes())
    with grpc.insecure_channel(small.target) as channel:
        request = encoder_pb2.EncodeImagesRequest(images=[good, image, good])
        responses = list(encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request, timeout=60))
    [error] = [r.error for r in responses if r.HasField("error")]
    assert (error.index, error.reason) == (1, reason)
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert error.message.endswith((".", "it."))
    assert {r.done.index for r in responses if r.HasField("done")} == {0, 2}


def failure(server: ServerProcess, *images: encoder_pb2.Image) -> grpc.RpcError:
    with grpc.insecure_channel(server.target) as channel:
        request = encoder_pb2.EncodeImagesRequest(images=images)
        with pytest.raises(grpc.RpcError) as caught:
            list(encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request, timeout=60))
    return caught.value


def reason_of(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.domain == "encoder-svc"
    return info.reason


def test_an_empty_request_is_refused(small: ServerProcess) -> None:
    error = failure(small)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_EMPTY")


def test_too_many_images_are_refused(small: ServerProcess) -> None:
    error = failure(small, *[encoder_pb2.Image(encoded=png(28, 28))] * 5)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_MANY_IMAGES")


def test_too_many_patches_are_refused(small: ServerProcess) -> None:
    error = failure(small, *[encoder_pb2.Image(encoded=png(1000, 1000))] * 4)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_MANY_PATCHES")


def test_a_request_a_little_too_large_is_refused_with_our_reason(small: ServerProcess) -> None:
    error = failure(small, encoder_pb2.Image(encoded=bytes(2 * 2**20)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")


def test_a_request_far_too_large_is_refused_by_the_transport(small: ServerProcess) -> None:
    error = failure(small, encoder_pb2.Image(encoded=bytes(16 * 2**20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("num_bytes", [2 * 2**20, 16 * 2**20])
def test_the_client_names_a_request_that_is_too_large(small: ServerProcess, num_bytes: int) -> None:
    with EncoderClient(small.target) as client, pytest.raises(OverloadedError) as caught:
        client.encode([bytes(num_bytes)])
    assert caught.value.reason == "REQUEST_TOO_LARGE"


def test_the_client_raises_the_image_that_failed(small: ServerProcess, photos: list[Path]) -> None:
    with EncoderClient(small.target) as client, pytest.raises(InvalidInputError) as caught:
        client.encode([photos[0], b"no image", photos[1]])
    assert (caught.value.image_index, caught.value.reason) == (1, "IMAGE_FORMAT")


def test_the_client_keeps_the_good_images_if_asked_to(small: ServerProcess, photos: list[Path]) -> None:
    with EncoderClient(small.target) as client:
        [first, second, third] = client.encode([photos[0], b"no image", photos[1]], return_errors=True)
    assert isinstance(second, RequestError)
    assert not isinstance(first, RequestError)
    assert not isinstance(third, RequestError)
    assert (first.index, third.index) == (0, 2)
