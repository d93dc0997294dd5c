"""Which queued images make the next batch. Pure: no torch, no grpc, no clock of its own."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """One image in the queue.

    Attributes:
        deadline_s: on the scheduler's clock; work that is still queued then is dropped.
        enqueued_s: on the same clock.
    """

    num_patches: int
    deadline_s: float = math.inf
    enqueued_s: float = 0.0


TicketT = TypeVar("TicketT", bound=Ticket)


class Scheduler(Generic[TicketT]):
    """First in, first out, with no timer: whenever the device is free, take what waits, up to a budget.

    Args:
        max_batch_patches: patches in one batch. An image with more of them runs alone.
        max_batch_images: images in one batch.
        max_queued_patches: patches that may wait; beyond them nothing is taken in.
    """

    def __init__(self, *, max_batch_patches: int, max_batch_images: int, max_queued_patches: int) -> None:
        self.max_batch_patches = max_batch_patches
        self.max_batch_images = max_batch_images
        self.max_queued_patches = max_queued_patches
        self.queued_patches = 0
        self._queue: deque[TicketT] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, ticket: TicketT) -> bool:
        """Queues a ticket. False if the queue is full; an empty queue takes a ticket of any size."""
        if self._queue and self.queued_patches + ticket.num_patches > self.max_queued_patches:
            return False
        self._queue.append(ticket)
        self.queued_patches += ticket.num_patches
        return True

    def remove(self, ticket: TicketT) -> bool:
        """Takes a ticket out of the queue. False if it is not there: already in a batch, or never added."""
        try:
            self._queue.remove(ticket)
        except ValueError:
            return False
        self.queued_patches -= ticket.num_patches
        return True

    def next_batch(self, now_s: float) -> tuple[list[TicketT], list[TicketT]]:
        """Takes the next batch off the queue.

        Returns:
            The batch, empty only if nothing waits; and the tickets whose deadline passed, which are dropped.
        """
        batch: list[TicketT] = []
        expired: list[TicketT] = []
        patches = 0
        while self._queue and len(batch) < self.max_batch_images:
            ticket = self._queue[0]
            if ticket.deadline_s <= now_s:
                expired.append(ticket)
            elif not batch or patches + ticket.num_patches <= self.max_batch_patches:
                batch.append(ticket)
                patches += ticket.num_patches
            else:
                break
            self._queue.popleft()
            self.queued_patches -= ticket.num_patches
        return batch, expired
