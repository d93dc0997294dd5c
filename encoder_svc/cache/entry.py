"""What a store keeps, and how its bytes come to be its own."""

from __future__ import annotations

from typing import Protocol, TypeVar


class Entry(Protocol):
    """Anything with a size. Immutable once stored."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keeping this entry costs; at least 1, and always the same."""
        ...


EntryT = TypeVar("EntryT", bound=Entry)


def own_bytes(data: bytes | bytearray | memoryview) -> memoryview:
    """``data`` as read-only bytes with no other owner, copied unless that is what they are already.

    One image's embeddings come as a view into its whole batch's buffer. Such a view in the store would keep all of the
    batch in memory while only the image's part is counted, and would change when the buffer is used again.
    """
    if isinstance(data, memoryview) and data.c_contiguous and isinstance(data.obj, bytes):
        if data.nbytes == len(data.obj):
            return memoryview(data.obj)
    elif isinstance(data, bytes):
        return memoryview(data)
    return memoryview(bytes(data))
