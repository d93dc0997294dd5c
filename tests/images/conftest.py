from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from encoder_svc.images.decode import OpenedImage
from encoder_svc.images.limits import Limits
from encoder_svc.images.processor import ImageProcessor, ProcessorSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class PngFile(Protocol):
    """Builds a PNG file by hand: what Pillow cannot write, and what no image library would."""

    def __call__(
        self,
        *,
        width: int,
        height: int,
        bit_depth: int,
        colour_type: int,
        rows: bytes,
        before: Iterable[tuple[bytes, bytes]] = (),
        after: Iterable[tuple[bytes, bytes]] = (),
    ) -> bytes: ...


@pytest.fixture(scope="session")
def png_file() -> PngFile:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def build(*, width, height, bit_depth, colour_type, rows, before=(), after=()) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
        stride = len(rows) // height
        filtered = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride or 1))
        chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(filtered)), *after, (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)

    return build


@pytest.fixture(scope="session")
def photo_files() -> dict[str, bytes]:
    """The photographs' files by name."""
    return {path.name: path.read_bytes() for path in sorted((Path(__file__).parent.parent / "photos").glob("*.jpg"))}


@pytest.fixture(scope="session")
def settings() -> ProcessorSettings:
    """Qwen2.5-VL's, with an upper bound that keeps tests quick."""
    return ProcessorSettings(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 64,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    )


@pytest.fixture(scope="session")
def processor(settings: ProcessorSettings) -> ImageProcessor:
    return ImageProcessor(settings, Limits())


@pytest.fixture(scope="session")
def open_image() -> Callable[[bytes], OpenedImage]:
    """Opens a file under the default limits."""
    return lambda data: OpenedImage(data, Limits())
