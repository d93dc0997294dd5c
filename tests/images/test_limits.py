"""Every limit at, below and above its bound, and that nothing large is allocated for what is refused."""

from __future__ import annotations

import resource
import struct
import time
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from encoder_svc.errors import InvalidInputError, OverloadedError, Reason, RequestError
from encoder_svc.images.decode import OpenedImage
from encoder_svc.images.limits import Limits
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
from encoder_svc.images.types import EncodedImageBytes, GridThw, ImageSource, PixelValues, RawRgb

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = Limits(
    max_image_bytes=1_000,
    max_request_bytes=5_000,
    max_image_side=400,
    max_image_pixels=10_000,
    max_images=3,
    max_request_patches=64,
)
HUGE = 2**31 - 1


def reason_of(check: Callable[[], object]) -> Reason | None:
    """Why ``check`` refuses, or None if it does not."""
    try:
        check()
    except RequestError as error:
        return Reason(error.reason)
    return None


@pytest.mark.parametrize(
    ("check", "below", "at", "above", "reason"),
    [
        pytest.param(LIMITS.check_num_images, 1, 3, 4, Reason.REQUEST_TOO_MANY_IMAGES, id="images"),
        pytest.param(LIMITS.check_num_keys, 1, 3, 4, Reason.REQUEST_TOO_MANY_IMAGES, id="keys"),
        pytest.param(LIMITS.check_request_bytes, 4_999, 5_000, 5_001, Reason.REQUEST_TOO_LARGE, id="request bytes"),
        pytest.param(LIMITS.check_request_patches, 63, 64, 65, Reason.REQUEST_TOO_MANY_PATCHES, id="request patches"),
        pytest.param(LIMITS.check_image_bytes, 999, 1_000, 1_001, Reason.IMAGE_TOO_LARGE, id="image bytes"),
    ],
)
def test_counts_are_taken_up_to_and_with_the_bound(
    check: Callable[[int], None], below: int, at: int, above: int, reason: Reason
) -> None:
    assert [reason_of(lambda n=n: check(n)) for n in (below, at, above)] == [None, None, reason]


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        pytest.param(1, 1, None, id="one pixel"),
        pytest.param(0, 5, Reason.IMAGE_SIDE, id="no rows"),
        pytest.param(5, 0, Reason.IMAGE_SIDE, id="no columns"),
        pytest.param(-1, -1, Reason.IMAGE_SIDE, id="negative"),
        pytest.param(25, 399, None, id="side below"),
        pytest.param(25, 400, None, id="side and pixels at"),
        pytest.param(400, 25, None, id="side and pixels at, tall"),
        pytest.param(25, 401, Reason.IMAGE_SIDE, id="side above"),
        pytest.param(401, 25, Reason.IMAGE_SIDE, id="side above, tall"),
        pytest.param(100, 99, None, id="pixels below"),
        pytest.param(100, 100, None, id="pixels at"),
        pytest.param(100, 101, Reason.IMAGE_PIXELS, id="pixels above"),
        pytest.param(2, 399, None, id="aspect below"),
        pytest.param(2, 400, None, id="aspect at"),
        pytest.param(1, 201, Reason.IMAGE_ASPECT_RATIO, id="aspect above"),
        pytest.param(201, 1, Reason.IMAGE_ASPECT_RATIO, id="aspect above, tall"),
    ],
)
def test_sizes_are_taken_up_to_and_with_the_bound(height: int, width: int, reason: Reason | None) -> None:
    assert reason_of(lambda: LIMITS.check_image_size(height, width)) == reason


def test_a_request_without_images_is_refused() -> None:
    assert reason_of(lambda: LIMITS.check_num_images(0)) == Reason.REQUEST_EMPTY


def test_an_image_without_bytes_is_refused() -> None:
    assert reason_of(lambda: LIMITS.check_image_bytes(0)) == Reason.IMAGE_MISSING


def test_a_request_that_is_too_large_is_overload_and_an_image_that_is_too_large_is_a_wrong_input() -> None:
    with pytest.raises(OverloadedError):
        LIMITS.check_request_bytes(5_001)
    with pytest.raises(InvalidInputError):
        LIMITS.check_image_bytes(1_001)


@pytest.mark.parametrize(
    ("check", "bound"),
    [
        pytest.param(lambda: LIMITS.check_num_images(4), "3", id="images"),
        pytest.param(lambda: LIMITS.check_request_bytes(5_001), "5000", id="request bytes"),
        pytest.param(lambda: LIMITS.check_request_patches(65), "64", id="request patches"),
        pytest.param(lambda: LIMITS.check_image_bytes(1_001), "1000", id="image bytes"),
        pytest.param(lambda: LIMITS.check_image_size(1, 401), "400", id="side"),
        pytest.param(lambda: LIMITS.check_image_size(101, 100), "10000", id="pixels"),
        pytest.param(lambda: LIMITS.check_image_size(1, 201), "200", id="aspect ratio"),
    ],
)
def test_a_refusal_names_the_bound(check: Callable[[], None], bound: str) -> None:
    with pytest.raises(RequestError, match=rf"\b{bound}\b"):
        check()


# Headers that promise much


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(bytes(64))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (body, idat)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def webp_header(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunks = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + b"VP8 " + struct.pack("<I", 64) + bytes(64)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def jpeg_header(width: int, height: int) -> bytes:
    components = bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    frame = struct.pack(">BHHB", 8, height, width, 3) + components
    scan = bytes([3, 1, 0, 2, 0x11, 3, 0x11, 0, 63, 0])
    segments = [(0xC0, frame), (0xDA, scan)]
    return b"\xff\xd8" + b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png_header(60_000, 60_000), id="png"),
        pytest.param(png_header(HUGE, HUGE), id="png of the largest size"),
        pytest.param(png_header(60_000, 400), id="png with one long side"),
        pytest.param(jpeg_header(60_000, 60_000), id="jpeg"),
        pytest.param(webp_header(16_000, 16_000), id="webp"),
    ],
)
def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken(data: bytes) -> None:
    peak_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError) as refused:
            OpenedImage(data, Limits())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.reason in {Reason.IMAGE_SIDE, Reason.IMAGE_PIXELS}
    assert peak_bytes < 4 * 2**20
    # What C code takes, tracemalloc does not see; a pixel buffer of any of these would be over 70 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before_kib < 32 * 2**10


def test_an_encoded_image_is_refused_by_its_length_before_it_is_read(settings: ProcessorSettings) -> None:
    processor = ImageProcessor(settings, LIMITS)
    assert reason_of(lambda: processor.plan(EncodedImageBytes(bytes(1_001)))) == Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize(
    ("height", "width"), [(1, 200), (200, 1), (3, 600)], ids=["200:1", "1:200", "200:1 and more than a line"]
)
def test_an_aspect_ratio_of_200_is_encoded(height: int, width: int, processor: ImageProcessor) -> None:
    plan = processor.plan(RawRgb(height, width, bytes(height * width * 3)))
    assert len(plan.process().patches) == plan.grid.num_patches


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1), (10, 2001)])
def test_a_greater_aspect_ratio_is_refused(height: int, width: int, processor: ImageProcessor) -> None:
    image = RawRgb(height, width, bytes(height * width * 3))
    assert reason_of(lambda: processor.plan(image)) == Reason.IMAGE_ASPECT_RATIO


# Raw pixels


def test_raw_pixels_keep_their_order(processor: ImageProcessor) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    processed = processor.plan(RawRgb(56, 84, pixels_HWC.tobytes())).process()
    assert processed.grid == (1, 4, 6)
    assert np.array_equal(processed.patches[0], pixels_HWC[:14, :14].transpose(2, 0, 1))
    assert np.array_equal(processed.patches[1], pixels_HWC[:14, 14:28].transpose(2, 0, 1))
    assert np.array_equal(processed.patches[2], pixels_HWC[14:28, :14].transpose(2, 0, 1))
    assert np.array_equal(processed.patches[4], pixels_HWC[:14, 28:42].transpose(2, 0, 1))


@pytest.mark.parametrize("length", [0, 1, 28 * 28 * 3 - 1, 28 * 28 * 3 + 1, 28 * 28, 28 * 28 * 4])
def test_raw_pixels_of_another_length_are_refused(length: int, processor: ImageProcessor) -> None:
    assert reason_of(lambda: processor.plan(RawRgb(28, 28, bytes(length)))) == Reason.RAW_SIZE


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (0, 28, Reason.IMAGE_SIDE),
        (28, 0, Reason.IMAGE_SIDE),
        (-28, 28, Reason.IMAGE_SIDE),
        (HUGE, HUGE, Reason.IMAGE_SIDE),
        (2**32 - 1, 1, Reason.IMAGE_SIDE),
        (9_000, 9_000, Reason.IMAGE_PIXELS),
    ],
)
def test_raw_pixels_of_an_illegal_size_are_refused(
    height: int, width: int, reason: Reason, processor: ImageProcessor
) -> None:
    assert reason_of(lambda: processor.plan(RawRgb(height, width, b""))) == reason


# Pixel values


def pixel_values(grid: tuple[int, int, int], *, dtype: str = "float32", rows: int | None = None) -> PixelValues:
    num_rows = max(0, grid[0] * grid[1] * grid[2]) if rows is None else rows
    itemsize = {"float32": 4}.get(dtype, 2)
    return PixelValues(GridThw(*grid), dtype, bytes(num_rows * 3 * 2 * 14 * 14 * itemsize))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pixel_values_pass_through_as_they_are(dtype: str, processor: ImageProcessor) -> None:
    numpy_dtype = {"float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}[dtype]
    values = np.random.default_rng(0).standard_normal((8, 1176)).astype(numpy_dtype)
    processed = processor.plan(PixelValues(GridThw(1, 2, 4), dtype, values.tobytes())).process()
    assert processed.grid == (1, 2, 4)
    assert processed.patches.dtype == values.dtype
    assert np.array_equal(processed.patches, values)


@pytest.mark.parametrize(
    "grid",
    [
        (0, 2, 2),
        (1, 0, 2),
        (1, 2, 0),
        (0, 0, 0),
        (-1, 2, 2),
        (1, -2, -2),
        (-1, -2, 2),
        (1, 3, 2),
        (1, 2, 3),
        (1, 1, 1),
        (-HUGE, -HUGE, HUGE),
    ],
)
def test_a_grid_that_is_not_positive_and_whole_in_merged_blocks_is_refused(
    grid: tuple[int, int, int], processor: ImageProcessor
) -> None:
    assert reason_of(lambda: processor.plan(pixel_values(grid, rows=4))) == Reason.GRID_INVALID


@pytest.mark.parametrize("rows", [0, 1, 7, 9, 16])
def test_a_grid_that_does_not_match_its_rows_is_refused(rows: int, processor: ImageProcessor) -> None:
    assert reason_of(lambda: processor.plan(pixel_values((1, 2, 4), rows=rows))) == Reason.GRID_MISMATCH


def test_rows_of_another_dtype_than_said_are_refused(processor: ImageProcessor) -> None:
    half = pixel_values((1, 2, 4), dtype="float16")
    assert reason_of(lambda: processor.plan(PixelValues(half.grid, "float32", half.data))) == Reason.GRID_MISMATCH


@pytest.mark.parametrize("length_change", [-1, 1])
def test_half_a_value_is_refused(length_change: int, processor: ImageProcessor) -> None:
    values = pixel_values((1, 2, 2))
    data = values.data[:-1] if length_change < 0 else values.data + b"\0"
    assert reason_of(lambda: processor.plan(PixelValues(values.grid, "float32", data))) == Reason.GRID_MISMATCH


@pytest.mark.parametrize("dtype", ["", "float64", "int8", "uint8", "FLOAT32", "object"])
def test_an_unknown_dtype_is_refused(dtype: str, processor: ImageProcessor) -> None:
    assert reason_of(lambda: processor.plan(pixel_values((1, 2, 2), dtype=dtype))) == Reason.DTYPE_UNSUPPORTED


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_pixel_values_that_are_not_finite_are_refused(bad: float, dtype: str, processor: ImageProcessor) -> None:
    numpy_dtype = {"float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}[dtype]
    values = np.zeros((4, 1176), numpy_dtype)
    values[3, 1175] = bad
    plan = processor.plan(PixelValues(GridThw(1, 2, 2), dtype, values.tobytes()))
    assert reason_of(plan.process) == Reason.PIXEL_VALUES_NOT_FINITE


@pytest.mark.alone
@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ((1, HUGE - 1, HUGE - 1), Reason.IMAGE_SIDE),
        ((1, 2, HUGE - 1), Reason.IMAGE_SIDE),
        ((1, HUGE - 1, 2), Reason.IMAGE_SIDE),
        ((HUGE, 2, 2), Reason.REQUEST_TOO_MANY_PATCHES),
        ((HUGE, HUGE - 1, HUGE - 1), Reason.IMAGE_SIDE),
        ((1, 2_000, 2_000), Reason.IMAGE_PIXELS),
        ((1, 2, 402), Reason.IMAGE_ASPECT_RATIO),
        ((262_144 // 4 + 1, 2, 2), Reason.REQUEST_TOO_MANY_PATCHES),
    ],
)
def test_a_huge_grid_is_refused_at_once(grid: tuple[int, int, int], reason: Reason, processor: ImageProcessor) -> None:
    image: ImageSource = pixel_values(grid, rows=4)
    started_s = time.perf_counter()
    assert reason_of(lambda: processor.plan(image)) == reason
    assert time.perf_counter() - started_s < 1
