"""Inline transport: a tensor's bytes as chunks of a server stream.

Python gRPC moves large tensors best as 256 KiB to 1 MiB messages; one large message is several times slower and
blocks the event loop while it is copied (../docs/architecture.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CHUNK_BYTES: Final = 2**20
CHUNK_BYTES: Final = 2**19


def chunks(data: memoryview) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each chunk, in order."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield offset, bytes(data[offset : offset + CHUNK_BYTES])
