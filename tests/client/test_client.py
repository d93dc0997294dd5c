"""The sync and the async client against a real server."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

from encoder_svc.client import (
    AsyncEncoderClient,
    DeadlineError,
    EncodedImage,
    EncoderClient,
    PixelValues,
    RequestError,
    UnavailableError,
)
from encoder_svc.client.request import encode_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.serving import ServerProcess


@pytest.fixture
def target(server: Callable[..., ServerProcess]) -> str:
    return server("qwen3_vl").target


def test_images_come_back_in_the_callers_order(target: str, photos: list[Path]) -> None:
    with EncoderClient(target) as client:
        together = client.encode(photos)
        alone = [client.encode([photo])[0] for photo in photos]
    assert [image.index for image in together] == list(range(len(photos)))
    for one, other in zip(together, alone, strict=True):
        assert one.content_key == other.content_key
        np.testing.assert_allclose(one.embeddings, other.embeddings, rtol=0, atol=1e-4)


def test_a_stream_yields_every_image_once(target: str, photos: list[Path]) -> None:
    with EncoderClient(target) as client:
        results = list(client.stream(photos * 3))
    assert sorted(result.index for result in results if isinstance(result, EncodedImage)) == list(range(15))


async def test_the_async_client_does_the_same(target: str, photos: list[Path]) -> None:
    async with AsyncEncoderClient(target) as client:
        info = await client.info()
        images = await client.encode(photos)
        streamed = [result async for result in client.stream([photos[0], b"no image"])]
    assert info.family == "qwen3_vl"
    assert [image.index for image in images] == list(range(len(photos)))
    assert sum(isinstance(result, RequestError) for result in streamed) == 1


async def test_the_async_client_raises_typed_errors(target: str) -> None:
    async with AsyncEncoderClient(target) as client:
        with pytest.raises(RequestError) as caught:
            await client.encode([])
    assert (caught.value.reason, caught.value.code) == ("REQUEST_EMPTY", "INVALID_ARGUMENT")


def test_every_way_to_hand_over_an_image_gives_the_same_embeddings(target: str, photos: list[Path]) -> None:
    path = photos[0]
    pil = Image.open(path)
    with EncoderClient(target) as client:
        images = client.encode([path, str(path), path.read_bytes(), pil, np.asarray(pil.convert("RGB"))])
    for image in images[1:]:
        np.testing.assert_allclose(image.embeddings, images[0].embeddings, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_a_pil_image_of_any_mode_is_seen_as_its_file_would_be(target: str, photos: list[Path], mode: str) -> None:
    image = Image.open(photos[0]).resize((96, 96))
    converted = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    pil = converted if mode == "I;16" else image.convert(mode)
    with EncoderClient(target) as client:
        [encoded] = client.encode([pil])
    assert encoded.embeddings.any()


def test_a_rotated_pil_image_is_turned_upright(target: str, tmp_path: Path, photos: list[Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos[1]).save(tmp_path / "rotated.png", exif=exif)
    with EncoderClient(target) as client:
        [file, pil] = client.encode([tmp_path / "rotated.png", Image.open(tmp_path / "rotated.png")])
    assert file.grid_thw == pil.grid_thw
    assert file.embeddings.tobytes() == pil.embeddings.tobytes()


def test_embeddings_are_a_view_and_deepstack_is_a_view_of_them(target: str, photos: list[Path]) -> None:
    with EncoderClient(target) as client:
        [image] = client.encode(photos[:1])
    rows = image.embeddings.shape[0]
    assert not image.embeddings.flags.owndata
    assert image.main.shape == (rows, 64)
    assert image.deepstack.shape == (3, rows, 64)
    assert np.shares_memory(image.deepstack, image.embeddings)
    for level in range(3):
        np.testing.assert_array_equal(image.deepstack[level], image.embeddings[:, 64 * (level + 1) : 64 * (level + 2)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_shares_the_memory_of_the_view(server, photos: list[Path], dtype: str) -> None:
    with EncoderClient(server("qwen3_vl", "--dtype", dtype).target) as client:
        [image] = client.encode(photos[:1])
    tensor = image.torch()
    assert tensor.dtype is getattr(torch, dtype)
    assert tensor.data_ptr() == image.embeddings.ctypes.data
    if dtype == "bfloat16":
        assert image.embeddings.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.float().numpy(), image.embeddings.astype(np.float32))


def test_timings_name_every_stage(target: str) -> None:
    noise = np.random.default_rng(42).integers(0, 256, (300, 300, 3), np.uint8)
    with EncoderClient(target) as client:
        timings = client.encode([noise])[0].timings
    for stage in ("admission", "decode", "resize", "queue", "forward", "send"):
        assert getattr(timings, f"{stage}_s") > 0, stage


def test_nobody_there_is_unavailable() -> None:
    with EncoderClient("127.0.0.1:1") as client, pytest.raises(UnavailableError) as caught:
        client.info(timeout_s=5)
    assert caught.value.reason == "UNREACHABLE"


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ("photo.jpg", TypeError),
        (b"bytes", TypeError),
        ([42], TypeError),
        ([np.zeros((4, 4, 3), np.float32)], ValueError),
        ([np.zeros((4, 4), np.uint8)], ValueError),
        ([np.zeros((4, 4, 4), np.uint8)], ValueError),
        (["/nowhere/photo.jpg"], FileNotFoundError),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(images, error: type[Exception]) -> None:
    with pytest.raises(error):
        encode_request(images, "")


def pixel_values(dtype: Any = np.float32, shape: tuple[int, ...] = (4, 1176)) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("values", "grid", "error", "why"),
    [
        ([[1.0]], (1, 1, 1), TypeError, "must be a numpy array, not list"),
        (torch.zeros(4, 1176), (1, 2, 2), TypeError, "must be a numpy array, not Tensor"),
        (pixel_values(np.float64), (1, 2, 2), ValueError, "must be float32, float16 or bfloat16, not float64"),
        (pixel_values(), (1, 2, 4), ValueError, r"with 8 rows here, not \[4, 1176\]"),
        (pixel_values(shape=(4, 6, 196)), (1, 2, 2), ValueError, r"with 4 rows here, not \[4, 6, 196\]"),
        (pixel_values(), (2, 2), ValueError, r"grid_thw must be \(t, h, w\), not \(2, 2\)"),
    ],
)
def test_pixel_values_of_the_wrong_kind_are_refused_with_a_sentence(
    values: Any, grid: Any, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        encode_request([PixelValues(values, grid)], "")


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f2", "<f2"])
def test_pixel_values_of_either_byte_order_are_sent_little_endian(dtype: str) -> None:
    values = pixel_values(dtype)
    sent = encode_request([PixelValues(values, (1, 2, 2))], "").images[0].pixel_values
    np.testing.assert_array_equal(np.frombuffer(sent.data, "<" + dtype[1:]), values.ravel())


def test_a_request_id_that_utf8_cannot_carry_is_refused(target: str) -> None:
    with EncoderClient(target) as client:
        for call in (
            lambda: client.encode([b"x"], request_id="a\ud800"),
            lambda: client.fetch([], request_id="\udfff"),
        ):
            with pytest.raises(ValueError, match="holds a lone surrogate"):
                call()


def test_a_single_key_and_a_request_id_that_is_no_text_are_refused(target: str) -> None:
    with EncoderClient(target) as client:
        for call in (lambda: client.fetch("abc"), lambda: client.release("abc")):
            with pytest.raises(TypeError, match="put a single one in a list"):
                call()
        with pytest.raises(TypeError, match="request_id must be a text, not int"):
            client.encode([b"x"], request_id=5)  # type: ignore[arg-type]


# Timeouts


def test_a_timeout_of_zero_leaves_no_time(target: str) -> None:
    with EncoderClient(target, timeout_s=30) as client:
        client.info()
        with pytest.raises(DeadlineError):
            client.info(timeout_s=0)


async def test_a_timeout_of_zero_leaves_the_async_client_no_time(target: str) -> None:
    async with AsyncEncoderClient(target, timeout_s=30) as client:
        await client.info()
        with pytest.raises(DeadlineError):
            await client.info(timeout_s=0)


@pytest.mark.parametrize("timeout_s", [1e9, 1e10, 1e300, math.inf])
def test_a_timeout_without_end_is_none(target: str, timeout_s: float) -> None:
    with EncoderClient(target, timeout_s=0) as client:
        assert client.info(timeout_s=timeout_s).family == "qwen3_vl"


@pytest.mark.parametrize("timeout_s", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("kind", [EncoderClient, AsyncEncoderClient])
async def test_a_timeout_that_is_no_duration_is_refused(
    kind: type[EncoderClient | AsyncEncoderClient], timeout_s: float
) -> None:
    with pytest.raises(ValueError, match="timeout_s must be 0 or more seconds"):
        kind("127.0.0.1:1", timeout_s=timeout_s)
    client = kind("127.0.0.1:1")
    with pytest.raises(ValueError, match="timeout_s must be 0 or more seconds"):
        await client.info(timeout_s=timeout_s)  # type: ignore[misc]


# A connection that is not there


def test_what_grpc_says_of_a_broken_connection_is_passed_on() -> None:
    with EncoderClient("127.0.0.1:1") as client, pytest.raises(UnavailableError) as caught:
        client.info(timeout_s=5)
    begin = "No encoder service answers at 127.0.0.1:1, or the connection to it broke: "
    assert caught.value.message.startswith(begin)
    assert "Connection refused" in caught.value.message


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.info(),
        lambda client: client.encode([b"x"]),
        lambda client: client.retain([b"x"]),
        lambda client: client.fetch(["key"]),
        lambda client: client.release(["key"]),
    ],
    ids=["info", "encode", "retain", "fetch", "release"],
)
async def test_a_closed_client_says_so(call: Callable[[Any], Any]) -> None:
    blocking, coroutines = EncoderClient("127.0.0.1:1"), AsyncEncoderClient("127.0.0.1:1")
    blocking.close()
    await coroutines.close()
    with pytest.raises(UnavailableError, match=r"This client is closed\. \[UNREACHABLE\]"):
        call(blocking)
    with pytest.raises(UnavailableError, match=r"This client is closed\. \[UNREACHABLE\]"):
        await call(coroutines)


@pytest.mark.parametrize("module", ["encoder_svc.client", "encoder_svc.cli", "encoder_svc"])
def test_importing_needs_neither_torch_nor_pillow(module: str) -> None:
    heavy = "{'torch', 'PIL', 'transformers', 'yaml', 'huggingface_hub'}"
    code = f"import sys, {module}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""
