from __future__ import annotations

from dataclasses import dataclass

import pytest

from encoder_svc.cache.lru import ByteLru


@dataclass(frozen=True)
class Blob:
    nbytes: int


def lru_of(max_bytes: int, **sizes: int) -> ByteLru[Blob]:
    lru: ByteLru[Blob] = ByteLru(max_bytes)
    for key, nbytes in sizes.items():
        assert lru.put(key, Blob(nbytes))
    return lru


def kept(lru: ByteLru[Blob]) -> list[str]:
    return list(lru._entries)


def test_what_was_unused_for_longest_makes_room() -> None:
    lru = lru_of(10, a=4, b=4)
    lru.get("a")
    lru.put("c", Blob(3))
    assert (kept(lru), lru.num_bytes, lru.evictions) == (["a", "c"], 7, 1)


def test_as_many_go_as_must_and_no_more() -> None:
    lru = lru_of(10, a=2, b=2, c=2, d=2)
    lru.put("e", Blob(5))
    assert (kept(lru), lru.num_bytes, lru.evictions) == (["c", "d", "e"], 9, 2)


def test_an_entry_of_just_the_bound_fits() -> None:
    lru = lru_of(10, a=4, b=4)
    assert lru.put("c", Blob(10))
    assert (kept(lru), lru.num_bytes) == (["c"], 10)


def test_an_entry_over_the_bound_pushes_nothing_out() -> None:
    lru = lru_of(10, a=4, b=4)
    assert not lru.put("c", Blob(11))
    assert (kept(lru), lru.num_bytes, lru.evictions) == (["a", "b"], 8, 0)


def test_an_entry_that_is_taken_out_is_no_eviction() -> None:
    lru = lru_of(10, a=4, b=4)
    assert lru.pop("a") == Blob(4)
    assert lru.pop("a") is None
    assert (kept(lru), lru.num_bytes, lru.evictions, len(lru)) == (["b"], 4, 0, 1)


def test_a_key_is_put_once() -> None:
    with pytest.raises(AssertionError):
        lru_of(10, a=4).put("a", Blob(4))
