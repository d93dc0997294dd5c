"""Finished embeddings by content key: an LRU cache, and leases that pin an entry for another process to fetch.

Pure: no torch, no grpc, a clock passed in. An entry is charged to one of two bounds, never to both: ``max_bytes`` while
it is merely cached, ``max_leased_bytes`` while anyone holds a lease on it. One that is dropped while somebody reads it
is charged until it has been read. Together they bound what the store holds, and what is read of what it held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from encoder_svc.cache.entry import EntryT
from encoder_svc.cache.leases import Leases
from encoder_svc.cache.lru import ByteLru

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXPIRED_KEYS = 16_384
"""Keys that are remembered as expired, about 4 MB of them; older ones become unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """What a store has done and holds.

    Attributes:
        hits, misses: of :meth:`EmbeddingStore.get`, since the start.
        evictions: cached entries pushed out to make room, since the start.
        cached_bytes: of entries without a lease, and of those that were evicted and are still being read; at most
            ``max_bytes``.
        leased_bytes: of entries with one, and of those whose lease ended, that are cached no longer and still being
            read; at most ``max_leased_bytes``.
        num_entries: of both kinds.
        num_leased: of the second kind.
    """

    hits: int
    misses: int
    evictions: int
    cached_bytes: int
    leased_bytes: int
    num_entries: int
    num_leased: int


class EmbeddingStore(Generic[EntryT]):
    """Belongs to one event loop; not thread-safe.

    **Entries own their bytes.** An entry that holds a view into a larger buffer keeps all of that buffer alive while
    ``nbytes`` counts only a part, so whoever makes the entry copies the view first:
    :func:`encoder_svc.cache.entry.own_bytes`. Equal keys mean equal bytes, so an entry under a key that is held already
    is dropped in favour of the one held.

    **Leases are counted, not named**, because ``ReleaseEmbeddings`` names keys alone. Each :meth:`lease` adds a holder,
    each :meth:`release` takes one away, and the entry is pinned until the last is gone or the latest of their times has
    passed. One holder's time never ends by itself while another's runs, so a late release by a slow holder takes back
    its own hold and not the other's; in return a holder that vanishes pins the entry until the latest time. Once a key
    has expired its count starts anew, so a release that comes later still can hit a successor's hold. A release is not
    idempotent: send one for each lease, within its time.

    **Expiry is lazy**: every method acts first on the leases that have run out, except that :attr:`stats` reports what
    is held this moment. :meth:`expire`, called by a timer at :attr:`next_expiry_s`, frees memory without traffic.

    A lease that ends leaves its entry in the cache as if it were put there at that moment.

    Args:
        max_bytes: bound on cached entries; 0 caches nothing, leases work all the same.
        max_leased_bytes: bound on leased entries; 0 grants no lease.
        clock: seconds, never going back.
        max_expired_keys: how many keys are told from unknown ones after their lease ran out.
    """

    def __init__(
        self,
        max_bytes: int,
        max_leased_bytes: int,
        clock: Callable[[], float],
        *,
        max_expired_keys: int = _MAX_EXPIRED_KEYS,
    ) -> None:
        if max_bytes < 0 or max_leased_bytes < 0 or max_expired_keys < 0:
            raise ValueError("the bounds of a store must not be negative")
        self._clock = clock
        self._cached: ByteLru[EntryT] = ByteLru(max_bytes)
        self._leased: Leases[EntryT] = Leases(max_leased_bytes, max_expired_keys)
        self._hits = 0
        self._misses = 0

    @property
    def max_bytes(self) -> int:
        """Bound on cached entries, in bytes."""
        return self._cached.max_bytes

    @property
    def max_leased_bytes(self) -> int:
        """Bound on leased entries, in bytes."""
        return self._leased.max_bytes

    @property
    def next_expiry_s(self) -> float | None:
        """When the next lease runs out, on the store's clock, maybe past already; None if there is none."""
        return self._leased.next_expiry_s

    @property
    def stats(self) -> StoreStats:
        """A snapshot."""
        return StoreStats(
            hits=self._hits,
            misses=self._misses,
            evictions=self._cached.evictions,
            cached_bytes=self._cached.num_bytes,
            leased_bytes=self._leased.num_bytes,
            num_entries=len(self._cached) + len(self._leased),
            num_leased=len(self._leased),
        )

    def get(self, key: str) -> EntryT | None:
        """The entry, cached or leased, now the last to be evicted; None if it is not held. Counts a hit or a miss."""
        self.expire()
        entry = self._held(key)
        if entry is None:
            self._misses += 1
        else:
            self._hits += 1
        return entry

    def peek(self, key: str) -> EntryT | None:
        """As :meth:`get`, but counts nothing and leaves the order of eviction as it is."""
        self.expire()
        entry = self._leased.get(key)
        return self._cached.peek(key) if entry is None else entry

    def put(self, key: str, entry: EntryT) -> bool:
        """Caches an entry, evicting those unused for longest. False if it is not kept: there is no room."""
        _check(entry)
        self.expire()
        return self._held(key) is not None or self._cached.put(key, entry)

    def lease(self, key: str, entry: EntryT, seconds: float) -> float:
        """Pins an entry, cached before or not: it can be fetched, and is not evicted, for at least ``seconds``.

        On a key that is leased already this adds a holder and may lengthen its time, never shortens it.

        Returns:
            When the key expires now, on the store's clock.

        Raises:
            RequestError: LEASE_BYTES_EXHAUSTED; nothing is leased, a cached entry stays cached. ``retry_after_s`` is
                the time until the next lease runs out, or None if the entry alone is over ``max_leased_bytes``.
        """
        _check(entry)
        if not 0 < seconds < math.inf:
            raise ValueError(f"a lease lasts a positive, finite time, not {seconds} s")
        now_s = self._clock()
        self._expire(now_s)
        held = self._held(key)
        if held is None:
            held = entry
        expires_s = self._leased.add(key, held, now_s, now_s + seconds)
        self._cached.pop(key)
        self._cached.disown(held)
        return expires_s

    def fetch(self, key: str) -> EntryT:
        """The entry under a lease. One that is merely cached is not found: it might be gone at the next call.

        Raises:
            RequestError: KEY_EXPIRED if its last lease ran out and the key is remembered; else KEY_UNKNOWN, also after
                the last release.
        """
        self.expire()
        entry = self._leased.get(key)
        if entry is None:
            raise self._leased.not_found(key)
        return entry

    def release(self, key: str) -> bool:
        """Gives one lease back; the last one unpins the entry. False if the key is not leased, or no longer."""
        self.expire()
        if self._leased.get(key) is None:
            return False
        entry = self._leased.drop_holder(key)
        if entry is not None:
            self._unpin(key, entry)
        return True

    def expire(self) -> int:
        """Ends the leases that have run out; returns how many keys that unpinned."""
        return self._expire(self._clock())

    def _held(self, key: str) -> EntryT | None:
        entry = self._leased.get(key)
        return self._cached.get(key) if entry is None else entry

    def _expire(self, now_s: float) -> int:
        ended = self._leased.pop_expired(now_s)
        num_ended = len(ended)
        ended.reverse()
        while ended:  # not held here any more than elsewhere, should the next one evict it
            self._unpin(*ended.pop())
        return num_ended

    def _unpin(self, key: str, entry: EntryT) -> None:
        if not self._cached.put(key, entry):
            self._leased.linger(entry)


def _check(entry: EntryT) -> None:
    assert entry.nbytes > 0, "an entry of no bytes would escape every bound"
