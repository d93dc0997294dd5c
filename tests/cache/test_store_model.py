"""The store against a model made of plain dicts and lists, searched in full, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from encoder_svc.cache.store import EmbeddingStore, StoreStats
from encoder_svc.errors import Reason, RequestError, without_frames

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = st.sampled_from("abcdefgh")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 13, "g": 1, "h": 2}
"""Equal keys mean equal bytes, and so one size."""


@dataclass(frozen=True)
class Blob:
    key: str
    nbytes: int


def refusal(call: Callable[[], object]) -> RequestError:
    """What it raises, without the entries that its traceback holds."""
    try:
        call()
    except RequestError as error:
        return without_frames(error)
    raise AssertionError("it raises nothing")


@dataclass
class Lease:
    expires_s: int
    num_holders: int


class Uses(RuleBasedStateMachine):
    """``cached`` lists keys, the one unused for longest first; ``leases`` and ``expired`` are what they say."""

    @initialize(max_bytes=st.integers(0, 20), max_leased_bytes=st.integers(0, 20), remembered=st.integers(0, 3))
    def start(self, max_bytes: int, max_leased_bytes: int, remembered: int) -> None:
        self.now_s = 0
        self.remembered = remembered
        self.store: EmbeddingStore[Blob] = EmbeddingStore(
            max_bytes, max_leased_bytes, lambda: self.now_s, max_expired_keys=remembered
        )
        self.cached: list[str] = []
        self.leases: dict[str, Lease] = {}
        self.expired: list[str] = []
        self.hits = self.misses = self.evictions = 0

    def leased_bytes(self) -> int:
        return sum(SIZES[key] for key in self.leases)

    def model_put(self, key: str) -> bool:
        if SIZES[key] > self.store.max_bytes:
            return False
        while sum(SIZES[other] for other in self.cached) + SIZES[key] > self.store.max_bytes:
            self.cached.pop(0)
            self.evictions += 1
        self.cached.append(key)
        return True

    def model_use(self, key: str) -> bool:
        if key in self.cached:
            self.cached.remove(key)
            self.cached.append(key)
        return key in self.cached or key in self.leases

    def model_expire(self) -> int:
        due = sorted((lease.expires_s, key) for key, lease in self.leases.items() if lease.expires_s <= self.now_s)
        for _, key in due:
            del self.leases[key]
            self.model_put(key)
            self.expired = [*self.expired, key][max(0, len(self.expired) + 1 - self.remembered) :]
        return len(due)

    @rule(seconds=st.integers(1, 15))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        self.model_expire()
        entry = self.store.get(key)
        if self.model_use(key):
            self.hits += 1
            assert entry == Blob(key, SIZES[key])
        else:
            self.misses += 1
            assert entry is None

    @rule(key=KEYS)
    def put(self, key: str) -> None:
        self.model_expire()
        kept = self.model_use(key) or self.model_put(key)
        assert self.store.put(key, Blob(key, SIZES[key])) == kept

    @rule(key=KEYS, seconds=st.integers(1, 30))
    def lease(self, key: str, seconds: int) -> None:
        self.model_expire()
        self.model_use(key)
        expires_s = self.now_s + seconds
        entry = Blob(key, SIZES[key])
        if key in self.leases:
            self.leases[key].num_holders += 1
            self.leases[key].expires_s = max(self.leases[key].expires_s, expires_s)
            assert self.store.lease(key, entry, seconds) == self.leases[key].expires_s
        elif self.leased_bytes() + entry.nbytes <= self.store.max_leased_bytes:
            self.cached = [other for other in self.cached if other != key]
            self.expired = [other for other in self.expired if other != key]
            self.leases[key] = Lease(expires_s, 1)
            assert self.store.lease(key, entry, seconds) == expires_s
        else:
            error = refusal(lambda: self.store.lease(key, entry, seconds))
            assert (error.reason, error.code) == (Reason.LEASE_BYTES_EXHAUSTED, "RESOURCE_EXHAUSTED")
            if entry.nbytes > self.store.max_leased_bytes:
                assert error.retry_after_s is None
            else:
                assert error.retry_after_s == min(x.expires_s for x in self.leases.values()) - self.now_s > 0

    @rule(key=KEYS)
    def fetch(self, key: str) -> None:
        self.model_expire()
        if key in self.leases:
            assert self.store.fetch(key) == Blob(key, SIZES[key])
            return
        error = refusal(lambda: self.store.fetch(key))
        assert error.code == "NOT_FOUND"
        assert error.reason == (Reason.KEY_EXPIRED if key in self.expired else Reason.KEY_UNKNOWN)

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        self.model_expire()
        assert self.store.release(key) == (key in self.leases)
        if key in self.leases:
            self.leases[key].num_holders -= 1
            if self.leases[key].num_holders == 0:
                del self.leases[key]
                self.model_put(key)

    @rule()
    def expire(self) -> None:
        assert self.store.expire() == self.model_expire()

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        assert 0 <= self.store.stats.cached_bytes <= self.store.max_bytes
        assert 0 <= self.store.stats.leased_bytes <= self.store.max_leased_bytes

    @invariant()
    def what_is_held_and_counted_is_as_in_the_model(self) -> None:
        assert self.store.stats == StoreStats(
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            cached_bytes=sum(SIZES[key] for key in self.cached),
            leased_bytes=self.leased_bytes(),
            num_entries=len(self.cached) + len(self.leases),
            num_leased=len(self.leases),
        )
        assert self.store.next_expiry_s == min((lease.expires_s for lease in self.leases.values()), default=None)
        assert list(self.store._cached._entries) == self.cached
        assert list(self.store._leased._expired) == self.expired


def test_random_uses() -> None:
    run_state_machine_as_test(Uses, settings=settings(max_examples=400, stateful_step_count=50, deadline=None))
