"""The images that are sent: read or made before the run, and each copy made unique for next to nothing.

A copy is made unique where a decoder does not look (a comment), or, of raw pixels, in the first three: the server
does the same work for each, and a cache of finished embeddings, keyed by the bytes, finds none of them.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import numpy as np

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    import numpy.typing as npt

    from encoder_svc.client.types import ImageInput

Format: TypeAlias = Literal["jpeg", "png", "raw"]

FORMATS: Final[tuple[Format, ...]] = ("jpeg", "png", "raw")

_MARK_BYTES = 8
_JPEG_QUALITY = 85
_NOISE_BLOCK = 20
_PNG_HEADER_BYTES = 33  # the signature and IHDR, which comes first


class Picture(Protocol):
    """One image to send again and again."""

    @property
    def num_bytes(self) -> int:
        """What one copy takes on the wire."""

    def plain(self) -> ImageInput:
        """The image as it is."""

    def unique(self, mark: int) -> ImageInput:
        """The image with ``mark`` (0 ≤ mark < 2^64) in it: another mark, other bytes."""


class EncodedPicture:
    """A JPEG, PNG or WebP file. A mark is a JPEG comment, a PNG text chunk or an unknown WebP chunk.

    Raises:
        ConfigError: ``data`` is none of these, or its structure is broken.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data = data
        try:
            self._head, self._mark, self._tail = _around_mark(data)
        except (struct.error, IndexError):
            raise ConfigError(f"{name}: a broken image.") from None
        except ValueError:
            raise ConfigError(f"{name}: not a JPEG, PNG or WebP file.") from None

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    def plain(self) -> bytes:
        return self._data

    def unique(self, mark: int) -> bytes:
        return b"".join((self._head, self._mark(mark.to_bytes(_MARK_BYTES, "big")), self._tail))


class RawPicture:
    """[height, width, 3] uint8 pixels, at least three of them. A mark is written over the first."""

    def __init__(self, pixels_HWC: npt.NDArray[np.uint8]) -> None:
        self._pixels_HWC = np.ascontiguousarray(pixels_HWC)
        assert self._pixels_HWC.size >= _MARK_BYTES

    @property
    def num_bytes(self) -> int:
        return self._pixels_HWC.nbytes

    def plain(self) -> npt.NDArray[np.uint8]:
        return self._pixels_HWC

    def unique(self, mark: int) -> npt.NDArray[np.uint8]:
        pixels_HWC = self._pixels_HWC.copy()
        pixels_HWC.reshape(-1)[:_MARK_BYTES] = np.frombuffer(mark.to_bytes(_MARK_BYTES, "big"), np.uint8)
        return pixels_HWC


def noise_picture(width: int, height: int, image_format: Format, *, seed: int) -> Picture:
    """Seeded blocks with a little noise, which compress about as photographs do; sides in pixels.

    Raises:
        ConfigError: JPEG or PNG without Pillow.
    """
    random = np.random.default_rng((seed, width, height))
    blocks = random.integers(16, 240, (height // _NOISE_BLOCK + 1, width // _NOISE_BLOCK + 1, 3), np.uint8)
    coarse_HWC = blocks.repeat(_NOISE_BLOCK, 0)[:height].repeat(_NOISE_BLOCK, 1)[:, :width]
    fine_HWC = random.integers(0, 12, (height, width, 3), np.uint8)
    return _from_pixels(coarse_HWC + fine_HWC, image_format)


def photo_picture(path: Path, image_format: Format | None) -> Picture:
    """A file, as it is or (``image_format``) decoded and written anew.

    Raises:
        ConfigError: it cannot be read, is no image, or Pillow is needed and missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    if image_format is None:
        return EncodedPicture(data, str(path))
    image_module = _pillow("decode a photo")
    try:
        with image_module.open(io.BytesIO(data)) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
    except Exception as error:  # its decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise ConfigError(f"{path}: not an image that Pillow decodes.") from error
    if pixels_HWC.size < _MARK_BYTES:
        raise ConfigError(f"{path}: an image must have at least three pixels.")
    return _from_pixels(pixels_HWC, image_format)


def _from_pixels(pixels_HWC: npt.NDArray[np.uint8], image_format: Format) -> Picture:
    if image_format == "raw":
        return RawPicture(pixels_HWC)
    buffer = io.BytesIO()
    image = _pillow(f"write a {image_format}").fromarray(pixels_HWC)
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return EncodedPicture(buffer.getvalue(), image_format)


def _pillow(purpose: str) -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ConfigError(
            f"Pillow is needed to {purpose}: pip install pillow, or give sizes with format: raw in the --mix file."
        ) from None
    return Image


def _around_mark(data: bytes) -> tuple[bytes, Callable[[bytes], bytes], bytes]:
    """What comes before a mark, how a mark is written, what comes after."""
    if data.startswith(b"\xff\xd8\xff"):
        place = _end_of_jpeg_application_segments(data)
        return data[:place], _jpeg_comment, data[place:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:_PNG_HEADER_BYTES], _png_text, data[_PNG_HEADER_BYTES:]
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        (length,) = struct.unpack_from("<I", data, 4)
        longer = struct.pack("<I", length + len(_webp_chunk(bytes(_MARK_BYTES))))
        return b"RIFF" + longer + data[8 : 8 + length], _webp_chunk, data[8 + length :]
    raise ValueError


def _end_of_jpeg_application_segments(data: bytes) -> int:
    """JFIF and EXIF want their segments first (ITU-T T.81, B.1.1.4: marker, then a length that counts itself)."""
    place = 2
    while data[place] == 0xFF and 0xE0 <= data[place + 1] <= 0xEF:
        place += 2 + int(struct.unpack_from(">H", data, place + 2)[0])
    return place


def _jpeg_comment(mark: bytes) -> bytes:
    return b"\xff\xfe" + struct.pack(">H", 2 + len(mark)) + mark


def _png_text(mark: bytes) -> bytes:
    content = b"tEXtComment\0" + mark.hex().encode()
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def _webp_chunk(mark: bytes) -> bytes:
    return b"MARK" + struct.pack("<I", len(mark)) + mark
