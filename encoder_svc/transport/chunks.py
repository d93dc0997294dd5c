"""Inline transport: a tensor's bytes as chunks of a server stream.

Python gRPC moves large tensors best as 256 KiB to 1 MiB messages; one large message is several times slower and
blocks the event loop while it is copied (../docs/architecture.md). A chunk's bytes are copied once into its message,
and once more by gRPC: protobuf's own classes would copy them two times before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from encoder_svc._generated.encoder.v1 import encoder_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

MAX_CHUNK_BYTES: Final = 2**20
CHUNK_BYTES: Final = 2**20

_LENGTH_DELIMITED: Final = 2


def chunk_messages(index: int, data: memoryview) -> Iterator[bytes]:
    """``EncodeImagesResponse(chunk=ItemChunk(index=…, offset=…, data=…))`` for each chunk, in order, serialized."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield _chunk_message(index, offset, data[offset : offset + CHUNK_BYTES])


def serialized(message: Message | bytes) -> bytes:
    """A response as gRPC sends it; one that is serialized already as it is."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _chunk_message(index: int, offset: int, data: memoryview) -> bytes:
    """Source: https://protobuf.dev/programming-guides/encoding/, "Length-Delimited Records": a message inside another
    is its length and its fields, in any order."""
    fields = encoder_pb2.ItemChunk(index=index, offset=offset).SerializeToString() + _DATA + _varint(len(data))
    return b"".join((_CHUNK, _varint(len(fields) + len(data)), fields, data))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(message: type[Message], field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | _LENGTH_DELIMITED)


_CHUNK: Final = _tag(encoder_pb2.EncodeImagesResponse, "chunk")
_DATA: Final = _tag(encoder_pb2.ItemChunk, "data")
