"""One image from its source to patches: open (checks, cheap), then process (decode, resize, patchify)."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from encoder_svc.errors import Reason, request_error
from encoder_svc.images.decode import OpenedImage, decoders
from encoder_svc.images.limits import fits_device_resize
from encoder_svc.images.patches import patchify
from encoder_svc.images.resize import ImageProcessing, ResizeFlavour, resize, smart_resize
from encoder_svc.images.types import (
    DecodedImage,
    EncodedImageBytes,
    EncoderImage,
    GridThw,
    ImageSource,
    PixelValues,
    ProcessedImage,
    RawRgb,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from encoder_svc.images.limits import Limits

PIXEL_VALUE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorSettings:
    """How a checkpoint wants its images: its preprocessor config, and the resize flavour and place that we add."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resize: ResizeFlavour = "torch"
    image_processing: ImageProcessing = "host"

    @property
    def channels(self) -> int:
        return len(self.image_mean)

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch of pixel values."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def hash(self) -> str:
        """SHA-256, 64 hex digits, over every setting and the decoders' versions."""
        factors = asdict(self) | {"decoders": decoders()}
        return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A checked image: how many patches it will make is known, and nothing large was allocated yet.

    Attributes:
        process: decodes it, and resizes it unless the device does.
        decode_bytes: of memory that :attr:`process` takes at its peak, at most; 0 if next to nothing.
        pixel_bytes: what it takes as it is decoded, if it waits for the device like that; 0 if its patches do.
    """

    grid: GridThw
    process: Callable[[], EncoderImage]
    decode_bytes: int = 0
    pixel_bytes: int = 0


class ImageProcessor:
    """Turns images into patches for one checkpoint. Has no state between calls; safe in many threads."""

    def __init__(self, settings: ProcessorSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits

    def plan(self, source: ImageSource) -> PlannedImage:
        """Checks a source against every limit and works out its grid. Reads headers alone.

        Raises:
            RequestError: with the reason that fits (see docs/wire.md).
        """
        match source:
            case EncodedImageBytes(data):
                opened = OpenedImage(data, self.limits)
                return self._plan_pixels(opened.height, opened.width, opened.decode, opened.decode_bytes)
            case RawRgb(height, width, data):
                self._check_raw(source)
                # Nothing is decoded; the resize has a copy.
                pixels_HWC = np.frombuffer(data, np.uint8).reshape(height, width, 3)
                return self._plan_pixels(height, width, lambda: pixels_HWC, len(data))
            case PixelValues(grid):
                self._check_pixel_values(source)
                return PlannedImage(grid, lambda: self._pixel_values(source))

    def _plan_pixels(
        self,
        height: int,
        width: int,
        decode: Callable[[], npt.NDArray[np.uint8]],
        decode_bytes: int,
    ) -> PlannedImage:
        settings = self.settings
        resized = smart_resize(
            height, width, factor=settings.factor, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
        )
        grid = GridThw(1, resized[0] // settings.patch_size, resized[1] // settings.patch_size)
        if settings.image_processing == "device" and fits_device_resize(height, width, resized[0] * resized[1]):
            pixel_bytes = height * width * settings.channels
            return PlannedImage(grid, lambda: _decoded(grid, decode), decode_bytes, pixel_bytes)

        def process() -> ProcessedImage:
            started_s = time.perf_counter()
            pixels_HWC = decode()
            decoded_s = time.perf_counter()
            resized_HWC = resize(pixels_HWC, *resized, settings.resize)
            _, patches = patchify(resized_HWC, patch_size=settings.patch_size, merge_size=settings.merge_size)
            done_s = time.perf_counter()
            return ProcessedImage(grid, patches, decoded_s - started_s, done_s - decoded_s)

        return PlannedImage(grid, process, decode_bytes)

    def _check_raw(self, raw: RawRgb) -> None:
        self.limits.check_image_size(raw.height, raw.width)
        expected = raw.height * raw.width * 3
        if len(raw.data) != expected:
            raise request_error(
                Reason.RAW_SIZE,
                f"Raw RGB of {raw.width} x {raw.height} pixels is {expected} bytes; {len(raw.data)} were sent.",
            )

    def _check_pixel_values(self, values: PixelValues) -> None:
        t, h, w = values.grid
        merge = self.settings.merge_size
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise request_error(
                Reason.GRID_INVALID,
                f"grid_thw ({t}, {h}, {w}) is not legal: each is at least 1, and h and w are multiples of {merge}.",
            )
        self.limits.check_image_size(h * self.settings.patch_size, w * self.settings.patch_size)
        self.limits.check_request_patches(values.grid.num_patches)
        dtype = PIXEL_VALUE_DTYPES.get(values.dtype)
        if dtype is None:
            raise request_error(Reason.DTYPE_UNSUPPORTED, "pixel_values need a dtype: float32, float16 or bfloat16.")
        expected = values.grid.num_patches * self.settings.patch_dim * dtype.itemsize
        if len(values.data) != expected:
            raise request_error(
                Reason.GRID_MISMATCH,
                f"grid_thw ({t}, {h}, {w}) wants {values.grid.num_patches} rows of {self.settings.patch_dim} "
                f"{values.dtype} values, {expected} bytes; {len(values.data)} were sent.",
            )

    def _pixel_values(self, values: PixelValues) -> ProcessedImage:
        started_s = time.perf_counter()
        array = np.frombuffer(values.data, PIXEL_VALUE_DTYPES[values.dtype]).reshape(-1, self.settings.patch_dim)
        if not np.isfinite(array).all():
            raise request_error(Reason.PIXEL_VALUES_NOT_FINITE, "pixel_values hold NaN or infinity.")
        return ProcessedImage(values.grid, array, time.perf_counter() - started_s)


def _decoded(grid: GridThw, decode: Callable[[], npt.NDArray[np.uint8]]) -> DecodedImage:
    started_s = time.perf_counter()
    pixels_HWC = np.require(decode(), requirements=["C", "W"])
    return DecodedImage(grid, pixels_HWC, time.perf_counter() - started_s)
