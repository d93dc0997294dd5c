"""What is read of a store counts, kept or not, for as long as it is read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from encoder_svc.cache.lru import ByteLru
from encoder_svc.cache.store import EmbeddingStore
from encoder_svc.errors import Reason, RequestError, without_frames

KEYS = st.sampled_from("abcdef")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 13}


@dataclass(frozen=True)
class Blob:
    nbytes: int


class Reads(RuleBasedStateMachine):
    """``reading`` is what was taken out of the store and is still in hand."""

    @initialize(max_bytes=st.integers(0, 20), max_leased_bytes=st.integers(0, 20))
    def start(self, max_bytes: int, max_leased_bytes: int) -> None:
        self.now_s = 0
        self.store: EmbeddingStore[Blob] = EmbeddingStore(max_bytes, max_leased_bytes, lambda: self.now_s)
        self.reading: list[tuple[str, Blob]] = []

    @rule(key=KEYS)
    def put(self, key: str) -> None:
        self.store.put(key, Blob(SIZES[key]))

    @rule(key=KEYS, seconds=st.integers(1, 9))
    def lease(self, key: str, seconds: int) -> None:
        try:
            self.store.lease(key, Blob(SIZES[key]), seconds)
        except RequestError as error:
            without_frames(error)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), seconds=st.integers(1, 9))
    def retain_what_is_read(self, data: st.DataObject, seconds: int) -> None:
        key, entry = self.reading[data.draw(st.integers(0, len(self.reading) - 1))]
        try:
            self.store.lease(key, entry, seconds)
        except RequestError as error:
            without_frames(error)

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        self.store.release(key)

    @rule(seconds=st.integers(1, 9))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds
        self.store.expire()

    @rule(key=KEYS)
    def begin_to_read(self, key: str) -> None:
        entry = self.store.get(key)
        if entry is not None:
            self.reading.append((key, entry))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        del self.reading[data.draw(st.integers(0, len(self.reading) - 1))]

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        assert 0 <= self.store.stats.cached_bytes <= self.store.max_bytes
        assert 0 <= self.store.stats.leased_bytes <= self.store.max_leased_bytes

    @invariant()
    def all_that_is_kept_or_read_counts_once(self) -> None:
        kept = {id(entry): entry for key in SIZES if (entry := self.store.peek(key)) is not None}
        there = kept | {id(entry): entry for _, entry in self.reading}
        stats = self.store.stats
        assert stats.cached_bytes + stats.leased_bytes == sum(entry.nbytes for entry in there.values())


def test_random_reads() -> None:
    run_state_machine_as_test(Reads, settings=settings(max_examples=400, stateful_step_count=50, deadline=None))


def test_what_is_pushed_out_while_it_is_read_leaves_no_room_until_it_was_read() -> None:
    lru: ByteLru[Blob] = ByteLru(10)
    read = Blob(6)
    lru.put("a", read)
    assert not lru.put("b", Blob(5))
    assert (lru.get("a"), lru.num_bytes, lru.evictions) == (None, 6, 1)
    assert lru.put("c", Blob(4))
    assert not lru.put("d", Blob(5))
    assert lru.get("c")  # nothing goes for what would find no room all the same
    del read
    assert lru.put("d", Blob(6))
    assert lru.num_bytes == 10


def test_what_is_read_beyond_its_lease_leaves_no_room_for_another() -> None:
    store: EmbeddingStore[Blob] = EmbeddingStore(0, 10, lambda: 0.0)
    store.lease("a", Blob(6), 60)
    read = store.fetch("a")
    store.release("a")
    with pytest.raises(RequestError) as caught:
        store.lease("b", Blob(5), 60)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.LEASE_BYTES_EXHAUSTED, 1.0)
    del read
    store.lease("b", Blob(5), 60)
    assert store.stats.leased_bytes == 5


@pytest.mark.parametrize("max_bytes", [0, 10])
def test_what_is_retained_while_it_is_read_counts_once(max_bytes: int) -> None:
    store: EmbeddingStore[Blob] = EmbeddingStore(max_bytes, 10, lambda: 0.0)
    read = Blob(6)
    store.put("a", read)
    store.put("b", Blob(7))  # pushes it out
    for _ in range(2):
        store.lease("a", read, 60)
        assert (store.stats.cached_bytes, store.stats.leased_bytes) == (0, 6)
        store.release("a")
