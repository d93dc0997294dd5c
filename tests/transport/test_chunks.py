from __future__ import annotations

import pytest

from encoder_svc.transport.chunks import CHUNK_BYTES, MAX_CHUNK_BYTES, chunks


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
