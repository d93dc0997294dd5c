"""What a client receives. A chunk is read by hand: its bytes are copied once, to where they belong, and not two times
before, as by protobuf's own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc

if TYPE_CHECKING:
    from google.protobuf.message import Message

_VARINT, _LENGTH_DELIMITED = 0, 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """``ItemChunk``, its data a view of the message that it came in."""

    index: int
    offset: int
    data: memoryview


def parsed(message: bytes) -> encoder_pb2.EncodeImagesResponse | Chunk:
    """One message of an answer. Whatever is not written as servers write chunks is protobuf's to read, and to refuse.

    Raises:
        google.protobuf.message.DecodeError: it is no message.
    """
    chunk = _chunk(message) if message[:1] == _CHUNK else None
    return encoder_pb2.EncodeImagesResponse.FromString(message) if chunk is None else chunk


def stub(channel: Any) -> Any:
    """The service's methods on a channel, whose streamed messages come as :func:`parsed` returns them."""
    return encoder_pb2_grpc.EncoderStub(_Channel(channel))  # type: ignore[call-overload]


class _Channel:
    """A channel as generated code uses it."""

    def __init__(self, channel: Any) -> None:
        self.unary_unary = channel.unary_unary
        self._channel = channel

    def unary_stream(self, method: str, **options: Any) -> Any:
        return self._channel.unary_stream(method, **options | {"response_deserializer": parsed})


def _chunk(message: bytes) -> Chunk | None:
    """None where it holds anything else, or less.

    Source: https://protobuf.dev/programming-guides/encoding/: a field is its tag and a varint, or its tag, a length and
    so many bytes; one that is 0 may be left out.
    """
    try:
        length, at = _varint(message, len(_CHUNK))
        if at + length != len(message):
            return None
        numbers, data = {_INDEX: 0, _OFFSET: 0}, memoryview(b"")
        while at < len(message):
            tag, (value, at) = message[at], _varint(message, at + 1)
            if tag in numbers:
                numbers[tag] = value
            elif tag == _DATA and at + value <= len(message):
                data = memoryview(message)[at : at + value]
                at += value
            else:
                return None
    except IndexError:
        return None
    return Chunk(numbers[_INDEX], numbers[_OFFSET], data)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, and where it ends; the eighth bit says that more follow.

    Raises:
        IndexError: the message ends before it.
    """
    value = shift = 0
    while (byte := message[at]) > 127:
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
    return value | byte << shift, at + 1


def _tag(message: type[Message], field: str, kind: int) -> int:
    return message.DESCRIPTOR.fields_by_name[field].number << 3 | kind


_CHUNK: Final = bytes([_tag(encoder_pb2.EncodeImagesResponse, "chunk", _LENGTH_DELIMITED)])
_INDEX: Final = _tag(encoder_pb2.ItemChunk, "index", _VARINT)
_OFFSET: Final = _tag(encoder_pb2.ItemChunk, "offset", _VARINT)
_DATA: Final = _tag(encoder_pb2.ItemChunk, "data", _LENGTH_DELIMITED)
