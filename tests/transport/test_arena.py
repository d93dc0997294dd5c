"""Blocks of a shared file: none overlaps another, and what nobody refers to is free."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder_svc.transport.arena import Arena, ArenaView, FreeList, new_shared_file

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    file = new_shared_file("test")
    yield file
    os.close(file)


@pytest.fixture
def arena(file: int) -> Arena:
    return Arena(file, SIZE)


@given(st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=200), st.randoms(use_true_random=False))
def test_no_two_parts_overlap_and_all_comes_back(steps: list[int | None], chance: np.random.Generator) -> None:
    free, taken = FreeList(100), dict[int, int]()
    for size in steps:
        if size is None:
            if taken:
                start = chance.choice(sorted(taken))
                free.give_back(start, taken.pop(start))
            continue
        start = free.take(size)
        used = {byte for begin, length in taken.items() for byte in range(begin, begin + length)}
        if start is None:
            longest = max(len(run) for run in "".join(".#"[byte in used] for byte in range(100)).split("#"))
            assert longest < size
        else:
            assert not used & set(range(start, start + size))
            assert start + size <= 100
            taken[start] = size
        assert free.num_bytes == 100 - sum(taken.values())
    for start, size in taken.items():
        free.give_back(start, size)
    assert free.take(100) == 0


def test_another_view_of_the_file_sees_a_copy(arena: Arena, file: int) -> None:
    arena.take(100)
    owned = arena.own(memoryview(b"embeddings"))
    assert bytes(ArenaView(file).view(arena.offset(owned), len(owned))) == b"embeddings"


def test_a_block_is_free_once_no_view_of_it_is_left(arena: Arena) -> None:
    block = arena.take(SIZE)
    part = block[10:20].toreadonly()
    del block
    with pytest.raises(MemoryError):
        arena.take(1)
    assert arena.offset(part) == 10
    del part
    assert arena.taken_bytes == 0
    assert len(arena.take(SIZE)) == SIZE


def test_an_array_of_a_block_keeps_it(arena: Arena) -> None:
    array = np.frombuffer(arena.take(SIZE), np.float32).reshape(2, -1)
    with pytest.raises(MemoryError):
        arena.take(1)
    array[:] = 1
    del array
    arena.take(SIZE)


@pytest.mark.parametrize("is_whole", [True, False])
def test_several_blocks_are_neighbours_where_there_is_room_for_that(arena: Arena, is_whole: bool) -> None:
    kept = [arena.take(SIZE // 4) for _ in range(4)]
    del kept[1 if is_whole else slice(1, 4, 2)], kept[1 if is_whole else slice(0, 0)]
    blocks = arena.take_all([100, SIZE // 4])
    offsets = [arena.offset(block) for block in blocks]
    assert offsets == ([1024, 1152] if is_whole else [1024, 3072])
    assert [block.nbytes for block in blocks] == [100, SIZE // 4]
    del blocks[0]
    assert arena.taken_bytes == SIZE // 4 + sum(block.nbytes for block in kept)


def test_several_blocks_are_had_or_none(arena: Arena) -> None:
    held = arena.take(64)
    with pytest.raises(MemoryError):
        arena.take_all([SIZE // 2, SIZE // 2])
    assert arena.taken_bytes == held.nbytes


def test_who_waits_gets_what_becomes_free(arena: Arena) -> None:
    held = [arena.take(SIZE)]
    threading.Timer(0.2, held.clear).start()
    started_s = time.monotonic()
    arena.take(SIZE, wait_s=30)
    assert 0.1 < time.monotonic() - started_s < 10


def test_waiting_ends(arena: Arena) -> None:
    held = arena.take(SIZE)
    with pytest.raises(MemoryError, match="1 bytes do not fit"):
        arena.take(1, wait_s=0.05)
    assert held.nbytes == SIZE


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 10), (0, SIZE + 1), (SIZE, 1), (10, -5)])
def test_a_view_stays_in_the_file(arena: Arena, file: int, offset: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="are not in a file"):
        ArenaView(file).view(offset, num_bytes)
    assert arena.num_bytes == SIZE


def test_a_view_is_written_only_where_that_is_asked_for(arena: Arena, file: int) -> None:
    assert ArenaView(file).view(0, 1).readonly
    ArenaView(file, writable=True).view(0, 1)[0] = 7
    assert arena.take(1)[0] == 7


def test_memory_of_others_has_no_place_in_it(arena: Arena) -> None:
    with pytest.raises(AssertionError):
        arena.offset(memoryview(bytearray(10)))


def test_threads_get_blocks_of_their_own(arena: Arena) -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(300):
            block = np.frombuffer(arena.take(64, wait_s=10), np.uint8)
            block[:] = value
            time.sleep(0)
            if (block != value).any():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena.taken_bytes == 0
