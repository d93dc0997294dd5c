"""Entries that are pinned for a time, and keys that were. Pure: times are given, none is read."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic

from encoder_svc.cache.entry import EntryT
from encoder_svc.cache.expiry import ExpiryQueue
from encoder_svc.cache.lingering import Lingering
from encoder_svc.errors import Reason, RequestError, request_error

# What is being read may have been read by then.
_READ_S: Final = 1.0


@dataclass(slots=True)
class _Lease(Generic[EntryT]):
    entry: EntryT
    num_holders: int


class Leases(Generic[EntryT]):
    """Leased entries by key, each with a count of holders and one time of expiry, within a bound of bytes."""

    def __init__(self, max_bytes: int, max_expired_keys: int) -> None:
        self.max_bytes = max_bytes
        self._leased_bytes = 0
        self._lingering: Lingering[EntryT] = Lingering()
        self._max_expired_keys = max_expired_keys
        self._leases: dict[str, _Lease[EntryT]] = {}
        self._expiries = ExpiryQueue()
        self._expired: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_bytes(self) -> int:
        """Of the leased entries, and of those that :meth:`linger`; never above ``max_bytes``."""
        return self._leased_bytes + self._lingering.num_bytes

    @property
    def next_expiry_s(self) -> float | None:
        """When the next lease runs out; None if there is none."""
        return self._expiries.next_s

    def get(self, key: str) -> EntryT | None:
        """The leased entry; None if the key is not leased."""
        lease = self._leases.get(key)
        return None if lease is None else lease.entry

    def add(self, key: str, entry: EntryT, now_s: float, expires_s: float) -> float:
        """Adds a holder, and the entry if the key has none. Returns when the key expires now.

        Raises:
            RequestError: LEASE_BYTES_EXHAUSTED; nothing has changed.
        """
        lease = self._leases.get(key)
        if lease is not None:
            lease.num_holders += 1
        else:
            self._lingering.discard(entry)  # it fitted while it lingered, and does now
            if self.num_bytes + entry.nbytes > self.max_bytes:
                raise self._exhausted(entry.nbytes, now_s)
            self._leases[key] = _Lease(entry, num_holders=1)
            self._leased_bytes += entry.nbytes
            self._expired.pop(key, None)
        return self._expiries.extend(key, expires_s)

    def drop_holder(self, key: str) -> EntryT | None:
        """Takes one holder off a leased key; the entry if that was the last, else None."""
        self._leases[key].num_holders -= 1
        if self._leases[key].num_holders > 0:
            return None
        self._expiries.discard(key)
        return self._take(key)

    def pop_expired(self, now_s: float) -> list[tuple[str, EntryT]]:
        """Takes out what has run out at ``now_s``, soonest first, and remembers the keys."""
        popped = [(key, self._take(key)) for key in self._expiries.pop_due(now_s)]
        for key, _ in popped:
            self._expired[key] = None
            if len(self._expired) > self._max_expired_keys:
                self._expired.popitem(last=False)
        return popped

    def linger(self, entry: EntryT) -> None:
        """One whose lease ended, and which is kept nowhere: it counts for as long as somebody reads it."""
        self._lingering.add(entry)

    def not_found(self, key: str) -> RequestError:
        """Why a key is not leased: KEY_EXPIRED or KEY_UNKNOWN."""
        if key in self._expired:
            return request_error(Reason.KEY_EXPIRED, f"The lease on key {key[:64]!r} ran out. Encode the image again.")
        return request_error(
            Reason.KEY_UNKNOWN,
            f"Nothing is retained under key {key[:64]!r} on this replica. "
            "Ask the one that encoded the image, or encode it again.",
        )

    def _take(self, key: str) -> EntryT:
        entry = self._leases.pop(key).entry
        self._leased_bytes -= entry.nbytes
        return entry

    def _exhausted(self, num_bytes: int, now_s: float) -> RequestError:
        if num_bytes > self.max_bytes:
            return request_error(
                Reason.LEASE_BYTES_EXHAUSTED,
                f"These embeddings have {num_bytes} bytes; at most {self.max_bytes} may be retained in all. "
                "Have them streamed, or raise the server's bound.",
            )
        next_s = self.next_expiry_s
        return request_error(
            Reason.LEASE_BYTES_EXHAUSTED,
            f"{self.num_bytes} bytes are retained already, or still being read, at most {self.max_bytes} may be, and "
            f"these embeddings have {num_bytes}. Release keys, try again later or on another replica.",
            retry_after_s=_READ_S if next_s is None else next_s - now_s,
        )
