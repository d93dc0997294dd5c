from __future__ import annotations

import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.transport.chunks import CHUNK_BYTES, MAX_CHUNK_BYTES, chunk_messages, serialized


def chunks(data: memoryview, index: int = 0) -> list[tuple[int, bytes]]:
    """(offset, bytes) of each message, as protobuf reads it."""
    read = [encoder_pb2.EncodeImagesResponse.FromString(message) for message in chunk_messages(index, data)]
    assert all(message.chunk.index == index for message in read)
    return [(message.chunk.offset, message.chunk.data) for message in read]


def data_of(length: int) -> bytes:
    return bytes(range(251)) * (length // 251 + 1)


@pytest.mark.parametrize(
    "length", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7]
)
def test_chunks_put_together_at_their_offsets_are_the_data(length: int) -> None:
    data = data_of(length)[:length]
    together = bytearray(length)
    for offset, chunk in chunks(memoryview(data)):
        together[offset : offset + len(chunk)] = chunk
    assert together == data


@pytest.mark.parametrize("length", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
def test_chunks_follow_each_other_without_gap_or_overlap(length: int) -> None:
    end = 0
    for offset, chunk in chunks(memoryview(bytes(length))):
        assert offset == end
        end += len(chunk)
    assert end == length


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (CHUNK_BYTES - 1, [CHUNK_BYTES - 1]),
        (CHUNK_BYTES, [CHUNK_BYTES]),
        (CHUNK_BYTES + 1, [CHUNK_BYTES, 1]),
        (2 * CHUNK_BYTES, [CHUNK_BYTES, CHUNK_BYTES]),
    ],
)
def test_every_chunk_but_the_last_is_full(length: int, sizes: list[int]) -> None:
    assert [len(chunk) for _, chunk in chunks(memoryview(bytes(length)))] == sizes


def test_no_bytes_make_no_chunk() -> None:
    assert list(chunks(memoryview(b""))) == []


def test_a_chunk_is_within_the_bound_that_the_wire_promises() -> None:
    assert 0 < CHUNK_BYTES <= MAX_CHUNK_BYTES == 2**20


def test_a_chunk_does_not_change_with_the_memory_that_it_came_from() -> None:
    memory = bytearray(b"before")
    [(_, chunk)] = chunks(memoryview(memory))
    memory[:] = b"after!"
    assert chunk == b"before"


@pytest.mark.parametrize("index", [0, 1, 127, 128, 2**32 - 1])
@pytest.mark.parametrize("length", [1, 127, 128, 16_384, CHUNK_BYTES])
def test_a_chunk_s_message_is_protobuf_s_own(index: int, length: int) -> None:
    data = data_of(length)[:length]
    [message] = chunk_messages(index, memoryview(data))
    chunk = encoder_pb2.ItemChunk(index=index, offset=0, data=data)
    assert message == encoder_pb2.EncodeImagesResponse(chunk=chunk).SerializeToString()


def test_a_message_is_serialized_once() -> None:
    response = encoder_pb2.EncodeImagesResponse(header=encoder_pb2.ItemHeader(index=3))
    assert serialized(serialized(response)) == response.SerializeToString()
