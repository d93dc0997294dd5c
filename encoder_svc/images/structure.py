"""A file's own structure, walked before a library reads it, so that no hostile one keeps that library busy."""

from __future__ import annotations

import re
import struct

from encoder_svc.errors import Reason, RequestError, request_error

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# Pillow walks chunks in Python: a file of millions of empty ones would hold a thread, and the GIL, for seconds. An
# honest encoder writes chunks of 8 KiB or more, 4,096 in the largest file that is taken by default.
_MAX_PNG_CHUNKS = 2**16
# The same for a JPEG's segments before its pixels. An honest file has tens; profiles and maps in pieces, a few hundred.
_MAX_JPEG_SEGMENTS = 2**12
_MAX_JPEG_FILL_BYTES = 2**12
# A progressive file may go over all its pixels again in every twenty bytes. An honest one does so ten times, or a few
# dozen where each bit plane is a scan of its own.
_MAX_JPEG_SCANS = 100
_JPEG_FILL = re.compile(rb"\xff*")
_JPEG_END, _JPEG_START_OF_SCAN = 0xD9, 0xDA
# Among a scan's own bytes none of these occurs.
_JPEG_AFTER_SCAN = re.compile(rb"\xff[\xd9\xda\xe0-\xef\xfe]")
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


def walk_png(data: bytes) -> bytes:
    """The eXIf chunk of a PNG file, wherever it stands; empty if there is none.

    Raises:
        RequestError: IMAGE_CORRUPT, more chunks than any honest file has.
    """
    exif, offset = b"", len(PNG_SIGNATURE)
    for _ in range(_MAX_PNG_CHUNKS):
        if offset + 8 > len(data):
            return exif
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"eXIf":
            exif = exif or b"Exif\x00\x00" + data[offset + 8 : offset + 8 + length]
        offset += 12 + length
    raise corrupt()


def walk_jpeg(data: bytes) -> None:
    """Goes through a JPEG file up to the end of its first picture.

    Raises:
        RequestError: IMAGE_CORRUPT, more segments, filling or scans than any honest file has.
    """
    offset, fill_bytes = 2, 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        filled = _JPEG_FILL.match(data, offset, offset + _MAX_JPEG_FILL_BYTES)
        assert filled is not None  # it matches nothing as well
        fill_bytes += filled.end() - offset
        offset = filled.end()
        if fill_bytes > _MAX_JPEG_FILL_BYTES:
            break
        if offset + 3 > len(data):
            return
        if data[offset] == _JPEG_START_OF_SCAN:
            _count_scans(data, offset + 1)
            return
        if filled.end() == filled.start():
            offset += 1  # not a marker: Pillow, too, looks on byte by byte
        elif data[offset] in _JPEG_WITHOUT_LENGTH:
            offset += 1
        else:
            offset += 1 + int.from_bytes(data[offset + 1 : offset + 3], "big")
    raise corrupt()


def _count_scans(data: bytes, offset: int) -> None:
    """``offset`` is within the first; what follows the picture, another one say, does not count."""
    num_scans = 1
    for _ in range(_MAX_JPEG_SEGMENTS):
        found = _JPEG_AFTER_SCAN.search(data, offset)
        if found is None or data[found.end() - 1] == _JPEG_END:
            return
        offset = found.end()
        if data[offset - 1] == _JPEG_START_OF_SCAN:
            num_scans += 1
        else:
            offset += int.from_bytes(data[offset : offset + 2], "big")
        if num_scans > _MAX_JPEG_SCANS:
            break
    raise corrupt()


def corrupt() -> RequestError:
    """What a damaged file is refused with."""
    return request_error(Reason.IMAGE_CORRUPT, "The image is truncated or damaged: its pixels could not be decoded.")
