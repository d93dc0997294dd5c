"""What the store keeps must be its own, to the byte."""

from __future__ import annotations

import numpy as np
import pytest

from encoder_svc.cache.entry import own_bytes


def test_a_view_into_a_batch_is_copied_out_of_it() -> None:
    batch = bytearray(range(100))
    owned = own_bytes(memoryview(batch)[10:20])
    batch[:] = bytes(100)
    assert owned == bytes(range(10, 20))
    assert isinstance(owned.obj, bytes)
    assert len(owned.obj) == 10


def test_a_view_into_part_of_a_bytes_object_is_copied_out_of_it() -> None:
    owned = own_bytes(memoryview(bytes(range(100)))[10:20])
    assert isinstance(owned.obj, bytes)
    assert (owned, len(owned.obj)) == (bytes(range(10, 20)), 10)


@pytest.mark.parametrize(
    "make", [bytearray, lambda data: memoryview(bytearray(data)), lambda data: np.array(list(data), "u1").data]
)
def test_what_could_still_be_written_to_is_copied(make) -> None:
    source = make(b"abc")
    owned = own_bytes(source)
    source[0] = ord("z")
    assert owned == b"abc"
    assert owned.readonly


def test_whole_bytes_are_taken_as_they_are() -> None:
    data = b"embeddings"
    assert own_bytes(data).obj is data
    assert own_bytes(memoryview(data)).obj is data


def test_a_view_of_the_same_size_in_another_order_is_copied() -> None:
    assert own_bytes(memoryview(b"abc")[::-1]) == b"cba"


def test_rows_of_any_type_come_out_as_plain_bytes() -> None:
    rows = np.arange(12, dtype="<f4").reshape(3, 4)
    owned = own_bytes(rows[1:].data)
    assert (owned.format, owned.ndim, owned.nbytes, len(owned)) == ("B", 1, 32, 32)
    assert owned == rows[1:].tobytes()
