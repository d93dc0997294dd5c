"""Messages of an answer, read as protobuf reads them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from encoder_svc._generated.encoder.v1 import encoder_pb2 as pb
from encoder_svc.client.received import Chunk, parsed
from encoder_svc.transport.chunks import chunk_messages


def as_protobuf(message: bytes) -> tuple[int, int, bytes]:
    chunk = pb.EncodeImagesResponse.FromString(message).chunk
    return chunk.index, chunk.offset, chunk.data


@pytest.mark.parametrize("index", [0, 1, 127, 128, 2**32 - 1])
@pytest.mark.parametrize("offset", [0, 5, 2**40])
@pytest.mark.parametrize("length", [0, 1, 127, 128, 70_000])
def test_a_chunk_is_read_without_protobuf(index: int, offset: int, length: int) -> None:
    chunk = pb.ItemChunk(index=index, offset=offset, data=bytes(range(256)) * 300)
    chunk.data = chunk.data[:length]
    message = pb.EncodeImagesResponse(chunk=chunk).SerializeToString()
    read = parsed(message)
    assert isinstance(read, Chunk)
    assert (read.index, read.offset, bytes(read.data)) == as_protobuf(message)


def test_so_are_those_that_the_server_writes() -> None:
    messages = [*chunk_messages(3, memoryview(bytes(range(256)) * 10_000))]
    read = [parsed(message) for message in messages]
    assert len(read) > 1
    assert all(isinstance(chunk, Chunk) for chunk in read)
    assert [(c.index, c.offset, bytes(c.data)) for c in read] == [*map(as_protobuf, messages)]


@pytest.mark.parametrize(
    "response",
    [
        pb.EncodeImagesResponse(header=pb.ItemHeader(index=1, rows=3)),
        pb.EncodeImagesResponse(done=pb.ItemDone(index=2, crc32=7)),
        pb.EncodeImagesResponse(error=pb.ItemError(index=1, reason="IMAGE_CORRUPT")),
        pb.EncodeImagesResponse(summary=pb.Summary(num_images=1)),
        pb.EncodeImagesResponse(),
    ],
)
def test_other_messages_are_protobufs(response: pb.EncodeImagesResponse) -> None:
    assert parsed(response.SerializeToString()) == response


CHUNK = pb.ItemChunk(index=1, offset=2, data=b"abc").SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        b"\x12" + bytes([len(CHUNK)]) + CHUNK + pb.EncodeImagesResponse(done=pb.ItemDone(index=2)).SerializeToString(),
        b"\x12" + bytes([len(CHUNK) + 2]) + CHUNK + b"\x20\x01",  # a field that servers to come may add
        b"\x12" + bytes([len(CHUNK) + 2]) + b"\x08\x09" + CHUNK,  # the last of two wins
    ],
)
def test_what_servers_do_not_write_means_what_it_means_to_protobuf(message: bytes) -> None:
    read, expected = parsed(message), pb.EncodeImagesResponse.FromString(message)
    if isinstance(read, Chunk):
        assert (read.index, read.offset, bytes(read.data)) == as_protobuf(message)
    else:
        assert read == expected


@pytest.mark.parametrize("message", [b"\x12", b"\x12\x80", b"\x12\x05ab", b"\x12\x03\x1a\x05a", b"\x12\x01\x08"])
def test_a_message_that_ends_too_soon_is_none(message: bytes) -> None:
    with pytest.raises(DecodeError):
        parsed(message)
