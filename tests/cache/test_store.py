"""The store's rules by example; test_store_model.py holds it to a model over random use."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from encoder_svc.cache.store import EmbeddingStore
from encoder_svc.errors import NotFoundError, OverloadedError, Reason, RequestError


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Blob:
    nbytes: int
    label: str = ""


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store_of(clock: Clock, max_bytes: int = 10, max_leased_bytes: int = 10, **options: int) -> EmbeddingStore[Blob]:
    return EmbeddingStore(max_bytes, max_leased_bytes, clock, **options)


def reason_of(store: EmbeddingStore[Blob], key: str) -> str:
    with pytest.raises(NotFoundError) as caught:
        store.fetch(key)
    assert caught.value.code == "NOT_FOUND"
    return caught.value.reason


def test_what_was_put_is_got(clock: Clock) -> None:
    store, entry = store_of(clock), Blob(4)
    assert store.get("a") is None
    assert store.put("a", entry)
    assert store.get("a") is entry
    stats = store.stats
    assert (stats.hits, stats.misses, stats.evictions) == (1, 1, 0)
    assert (stats.cached_bytes, stats.leased_bytes, stats.num_entries, stats.num_leased) == (4, 0, 1, 0)


def test_getting_and_putting_again_keep_an_entry_longer(clock: Clock) -> None:
    store = store_of(clock, max_bytes=3)
    for key in "abc":
        store.put(key, Blob(1))
    store.get("a")
    store.put("b", Blob(1))
    store.put("d", Blob(1))
    assert [key for key in "abcd" if store.get(key)] == ["a", "b", "d"]


def test_an_entry_over_the_bound_is_not_kept(clock: Clock) -> None:
    store = store_of(clock)
    store.put("a", Blob(10))
    assert not store.put("b", Blob(11))
    assert store.get("a")
    assert store.get("b") is None


def test_a_second_entry_under_a_key_is_dropped(clock: Clock) -> None:
    store = store_of(clock)
    store.put("a", Blob(4, "first"))
    store.put("a", Blob(4, "second"))
    store.lease("a", Blob(4, "third"), 1)
    store.put("a", Blob(4, "fourth"))
    assert store.fetch("a").label == store.get("a").label == "first"
    assert store.stats.num_entries == 1


def test_a_leased_entry_outlives_any_traffic(clock: Clock) -> None:
    store = store_of(clock)
    store.put("kept", Blob(6))
    store.lease("kept", Blob(6), 60)
    for number in range(20):
        store.put(f"{number}", Blob(5))
    assert store.fetch("kept") is store.get("kept")
    stats = store.stats
    assert (stats.cached_bytes, stats.leased_bytes, stats.num_entries, stats.num_leased) == (10, 6, 3, 1)


def test_leases_work_without_a_cache(clock: Clock) -> None:
    store = store_of(clock, max_bytes=0)
    assert not store.put("a", Blob(1))
    store.lease("a", Blob(1), 60)
    assert store.put("a", Blob(1))  # kept already, by its lease
    assert store.fetch("a") == Blob(1)
    store.release("a")
    assert (store.get("a"), store.stats.num_entries, store.stats.evictions) == (None, 0, 0)


def test_a_lease_ends_at_its_time_and_not_before(clock: Clock) -> None:
    store = store_of(clock)
    assert store.lease("a", Blob(4), 60) == store.next_expiry_s == 160
    clock.now_s = 159.999
    assert store.fetch("a")
    clock.now_s = 160
    assert reason_of(store, "a") == Reason.KEY_EXPIRED
    assert store.next_expiry_s is None
    assert not store.release("a")


def test_an_expired_entry_stays_cached(clock: Clock) -> None:
    store = store_of(clock)
    store.put("old", Blob(8))
    store.lease("a", Blob(4), 60)
    clock.now_s = 160
    assert store.get("a")
    assert store.get("old") is None  # pushed out: the end of the lease put the entry in the cache
    assert (store.stats.cached_bytes, store.stats.leased_bytes, store.stats.evictions) == (4, 0, 1)
    assert reason_of(store, "a") == Reason.KEY_EXPIRED


def test_leases_that_end_together_enter_the_cache_in_the_order_of_their_ends(clock: Clock) -> None:
    store = store_of(clock, max_bytes=2)
    store.lease("late", Blob(1), 30)
    store.lease("early", Blob(1), 10)
    store.lease("middle", Blob(1), 20)
    clock.now_s += 60
    assert store.expire() == 3
    assert [key for key in ("early", "middle", "late") if store.get(key)] == ["middle", "late"]


def test_leasing_again_extends_and_never_shortens(clock: Clock) -> None:
    store = store_of(clock)
    assert store.lease("a", Blob(4), 60) == 160
    assert store.lease("a", Blob(4), 10) == 160
    assert store.lease("a", Blob(4), 90) == store.next_expiry_s == 190
    clock.now_s = 189
    assert store.fetch("a")
    assert store.stats.leased_bytes == 4


def test_each_holder_releases_once(clock: Clock) -> None:
    store = store_of(clock)
    store.lease("a", Blob(4), 60)
    store.lease("a", Blob(4), 60)
    assert store.release("a")
    assert store.fetch("a")
    assert store.release("a")
    assert reason_of(store, "a") == Reason.KEY_UNKNOWN
    assert not store.release("a")
    assert store.next_expiry_s is None
    assert store.get("a")  # cached still


def test_a_release_after_ones_own_time_takes_nothing_from_the_other_holder(clock: Clock) -> None:
    store = store_of(clock)
    store.lease("a", Blob(4), 10)
    store.lease("a", Blob(4), 100)
    clock.now_s += 50
    assert store.release("a")
    assert store.fetch("a")


def test_a_lease_after_a_release_has_its_own_time(clock: Clock) -> None:
    store = store_of(clock)
    store.lease("a", Blob(4), 100)
    store.release("a")
    assert store.lease("a", Blob(4), 10) == store.next_expiry_s == 110
    clock.now_s = 110
    assert reason_of(store, "a") == Reason.KEY_EXPIRED


def test_beyond_the_bound_the_next_expiry_says_when_to_try_again(clock: Clock) -> None:
    store = store_of(clock)
    store.lease("a", Blob(5), 60)
    store.lease("b", Blob(5), 30)
    store.put("c", Blob(1))
    clock.now_s += 10
    before = store.stats
    with pytest.raises(OverloadedError) as caught:
        store.lease("c", Blob(1), 60)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.LEASE_BYTES_EXHAUSTED, 20)
    assert store.stats == before
    assert reason_of(store, "c") == Reason.KEY_UNKNOWN
    assert store.lease("a", Blob(5), 60)  # costs nothing more
    clock.now_s += 20
    assert store.lease("c", Blob(1), 60)


@pytest.mark.parametrize("max_leased_bytes", [0, 4])
def test_what_can_never_be_leased_is_not_told_to_try_again(clock: Clock, max_leased_bytes: int) -> None:
    store = store_of(clock, max_leased_bytes=max_leased_bytes)
    with pytest.raises(RequestError) as caught:
        store.lease("a", Blob(5), 60)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.LEASE_BYTES_EXHAUSTED, None)
    assert store.stats.num_entries == 0


def test_a_key_that_was_only_cached_is_unknown_to_a_fetch(clock: Clock) -> None:
    store = store_of(clock)
    store.put("a", Blob(4))
    assert reason_of(store, "a") == reason_of(store, "b") == Reason.KEY_UNKNOWN
    assert (store.stats.hits, store.stats.misses) == (0, 0)


def test_a_long_key_is_not_echoed_whole(clock: Clock) -> None:
    with pytest.raises(NotFoundError) as caught:
        store_of(clock).fetch("x" * 10_000)
    assert len(str(caught.value)) < 300


def test_a_new_lease_forgets_that_the_key_once_expired(clock: Clock) -> None:
    store = store_of(clock)
    store.lease("a", Blob(4), 1)
    clock.now_s += 1
    assert reason_of(store, "a") == Reason.KEY_EXPIRED
    store.lease("a", Blob(4), 1)
    assert store.fetch("a")
    store.release("a")
    assert reason_of(store, "a") == Reason.KEY_UNKNOWN


@pytest.mark.parametrize("remembered", [0, 1, 3])
def test_expired_keys_are_remembered_up_to_a_bound_the_latest_first(clock: Clock, remembered: int) -> None:
    store = store_of(clock, max_expired_keys=remembered)
    for number in range(5):
        store.lease(f"{number}", Blob(1), 1 + number)
    clock.now_s += 60
    reasons = [reason_of(store, f"{number}") for number in range(5)]
    assert reasons == [Reason.KEY_UNKNOWN] * (5 - remembered) + [Reason.KEY_EXPIRED] * remembered
    assert len(store._leased._expired) == remembered


def test_a_timer_can_free_memory_without_traffic(clock: Clock) -> None:
    store = store_of(clock, max_bytes=0)
    store.lease("a", Blob(4), 60)
    clock.now_s = store.next_expiry_s
    assert store.stats.leased_bytes == 4
    assert store.expire() == 1
    assert store.expire() == 0
    assert (store.stats.leased_bytes, store.stats.num_entries) == (0, 0)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_lease_lasts_a_positive_finite_time(clock: Clock, seconds: float) -> None:
    store = store_of(clock)
    with pytest.raises(ValueError, match="positive, finite"):
        store.lease("a", Blob(4), seconds)
    assert store.stats.num_entries == 0


@pytest.mark.parametrize("bounds", [{"max_bytes": -1}, {"max_leased_bytes": -1}, {"max_expired_keys": -1}])
def test_a_bound_is_not_negative(clock: Clock, bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        store_of(clock, **bounds)


def test_an_entry_of_no_bytes_is_a_defect(clock: Clock) -> None:
    with pytest.raises(AssertionError):
        store_of(clock).put("a", Blob(0))


def test_the_cache_imports_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, encoder_svc.cache.store, encoder_svc.cache.single_flight\n"
        "sys.exit(str([name for name in ('torch', 'grpc', 'numpy') if name in sys.modules] or ''))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
    )


def test_a_peek_neither_counts_nor_saves_from_eviction() -> None:
    store: EmbeddingStore[Blob] = EmbeddingStore(2, 10, lambda: 0.0)
    store.put("a", Blob(1))
    store.put("b", Blob(1))
    assert store.peek("a") is not None
    assert store.peek("z") is None
    store.put("c", Blob(1))
    assert store.peek("a") is None
    assert (store.stats.hits, store.stats.misses) == (0, 0)
