"""Which queued images make the next batch. Pure: no torch, no grpc, no clock of its own.

Images of one request share a flow, and flows share the device: start-time fair queueing (Goyal, Vin, Cheng, 1996),
with patches as the cost. A ticket's start tag is the virtual time at which it was queued, or the end of its flow's
ticket before it, whichever is later; tickets leave in the order of their tags. So requests of one image leave first in,
first out, and a request of many images gives way to others after each of its own. Virtual time passes as each waiting
flow gets its share, so that a stream of new requests cannot hold back an old one's next image for ever.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """One image in the queue. Queued once, never again.

    Attributes:
        flow: what it shares its turn with: its request. None: nothing.
        deadline_s: on the scheduler's clock; work that is still queued then is dropped.
        enqueued_s: on the same clock.
    """

    num_patches: int
    flow: Hashable = None
    deadline_s: float = math.inf
    enqueued_s: float = 0.0


TicketT = TypeVar("TicketT", bound=Ticket)

# An image joins a batch that it makes at most so many times as long, or that stays short: small images must not wait
# for a large one only because it came right behind them.
_MAX_STRETCH = 3
# So many large ones that wait are looked past for what is small enough.
_MAX_PASSED_OVER = 16
# What is at most so small a part of something counts as short beside it.
_SHORT_PART = 8


@dataclass(slots=True)
class _Flow:
    """``end`` is the virtual time at which the flow's last ticket ends."""

    end: float = 0.0
    num_queued: int = 0


@dataclass(order=True, slots=True)
class _Entry(Generic[TicketT]):
    """A place in one of the heaps. It outlives its ticket there, and must not keep it: a ticket has its image in hand.

    Attributes:
        ticket: None once it left the queue.
    """

    key: tuple[float, ...]
    ticket: TicketT | None = field(compare=False)


class Scheduler(Generic[TicketT]):
    """Takes what waits whenever the device is free, up to a budget; there is no timer.

    Args:
        max_batch_patches: patches in one batch. An image with more of them runs alone.
        max_batch_images: images in one batch.

    Attributes:
        separates: keep what is short out of a long batch too: it can run beside it.
    """

    def __init__(self, *, max_batch_patches: int, max_batch_images: int) -> None:
        self.separates = False
        self.max_batch_patches = max_batch_patches
        self.max_batch_images = max_batch_images
        self.queued_patches = 0
        self._queued: dict[TicketT, list[_Entry[TicketT]]] = {}
        self._by_turn: list[_Entry[TicketT]] = []
        self._by_deadline: list[_Entry[TicketT]] = []
        self._flows: dict[Hashable, _Flow] = {}
        self._virtual_time = 0.0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, ticket: TicketT) -> None:
        """Queues a ticket. How much may wait is admission's business (engine/admission.py)."""
        self._num_added += 1
        start = self._virtual_time
        if ticket.flow is not None:
            flow = self._flows.setdefault(ticket.flow, _Flow())
            start = max(start, flow.end)
            flow.end = start + ticket.num_patches
            flow.num_queued += 1
        # Of tickets whose turn comes at the same time, the one with least time goes first, then the older.
        turn = _Entry((start, ticket.deadline_s, self._num_added), ticket)
        heapq.heappush(self._by_turn, turn)
        self._queued[ticket] = [turn]
        if ticket.deadline_s < math.inf:
            deadline = _Entry((ticket.deadline_s, self._num_added), ticket)
            heapq.heappush(self._by_deadline, deadline)
            self._queued[ticket].append(deadline)
        self.queued_patches += ticket.num_patches

    def remove(self, ticket: TicketT) -> bool:
        """Takes a ticket out of the queue. False if it is not there: already in a batch, or never added."""
        if ticket not in self._queued:
            return False
        self._take_out(ticket)
        if not self._queued:
            self._forget_idle_flows()
        self._bury()
        return True

    def has_full_batch(self) -> bool:
        """Whether as much waits as one batch may hold."""
        return self.queued_patches >= self.max_batch_patches or len(self) >= self.max_batch_images

    def next_batch(
        self, now_s: float, at_most_patches: int | None = None, *, num_sharers: int = 1
    ) -> tuple[list[TicketT], list[TicketT]]:
        """Takes the next batch off the queue.

        Args:
            at_most_patches: a bound for this batch alone, for its first image too. What is larger keeps its turn, and
                what comes behind it goes first.
            num_sharers: how many devices would take a batch now: none takes more than its share, but for one image.

        Returns:
            The batch, empty only if nothing waits that may go now; and every ticket whose deadline passed, wherever it
            waited: dropped.
        """
        expired = self._expire(now_s)
        num_flows = self._num_flows()
        budget = min(self.max_batch_patches, -(-self.queued_patches // num_sharers))
        batch = self._take_in_turn(budget, math.inf if at_most_patches is None else at_most_patches)
        self._virtual_time += sum(ticket.num_patches for ticket in batch) / max(num_flows, 1)
        self._forget_idle_flows()
        self._bury()
        return batch, expired

    def _take_in_turn(self, budget: int, at_most_patches: float) -> list[TicketT]:
        batch: list[TicketT] = []
        passed_over: list[_Entry[TicketT]] = []
        patches = 0
        while self._by_turn and len(batch) < self.max_batch_images:
            entry = self._by_turn[0]
            ticket = entry.ticket
            if ticket is not None:
                if patches + ticket.num_patches > at_most_patches or self._is_behind(ticket, passed_over):
                    if len(passed_over) == _MAX_PASSED_OVER:
                        break
                    passed_over.append(heapq.heappop(self._by_turn))
                    continue
                if batch and not self._may_join(ticket.num_patches, patches, budget):
                    break
                batch.append(ticket)
                patches += ticket.num_patches
                self._virtual_time = max(self._virtual_time, entry.key[0])
                self._take_out(ticket)
            heapq.heappop(self._by_turn)
        for entry in passed_over:
            heapq.heappush(self._by_turn, entry)
        return batch

    def _is_behind(self, ticket: TicketT, entries: list[_Entry[TicketT]]) -> bool:
        """Whether one of these is of the same flow."""
        return ticket.flow is not None and any(entry.ticket and entry.ticket.flow == ticket.flow for entry in entries)

    def _may_join(self, num_patches: int, batch_patches: int, budget: int) -> bool:
        longer = batch_patches + num_patches
        if longer > budget or (self.separates and num_patches * _SHORT_PART <= batch_patches):
            return False
        return longer <= _MAX_STRETCH * batch_patches or longer * _SHORT_PART <= self.max_batch_patches

    def _num_flows(self) -> int:
        """How many share the device now. A ticket without a flow is one of its own."""
        with_flow = [flow.num_queued for flow in self._flows.values() if flow.num_queued]
        return len(with_flow) + len(self._queued) - sum(with_flow)

    def _expire(self, now_s: float) -> list[TicketT]:
        expired = []
        while self._by_deadline and self._by_deadline[0].key[0] <= now_s:
            ticket = heapq.heappop(self._by_deadline).ticket
            if ticket is not None:
                self._take_out(ticket)
                expired.append(ticket)
        return expired

    def _take_out(self, ticket: TicketT) -> None:
        for entry in self._queued.pop(ticket):
            entry.ticket = None
        self.queued_patches -= ticket.num_patches
        if ticket.flow is not None:
            self._flows[ticket.flow].num_queued -= 1

    def _forget_idle_flows(self) -> None:
        """A flow with nothing queued counts only while its last turn lies ahead."""
        self._flows = {
            name: flow
            for name, flow in self._flows.items()
            if flow.num_queued or (self._queued and flow.end > self._virtual_time)
        }

    def _bury(self) -> None:
        """Frees the places of tickets that left the queue, before they outnumber those that wait."""
        if len(self._by_turn) > 2 * len(self._queued) + 16:
            self._by_turn = self._living(self._by_turn)
        if len(self._by_deadline) > 2 * len(self._queued) + 16:
            self._by_deadline = self._living(self._by_deadline)

    def _living(self, heap: list[_Entry[TicketT]]) -> list[_Entry[TicketT]]:
        living = [entry for entry in heap if entry.ticket is not None]
        heapq.heapify(living)
        return living
