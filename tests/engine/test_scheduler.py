"""The scheduler against a model of it, over random schedules on a clock of the test's own, and its rules by example."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from encoder_svc.engine.scheduler import Scheduler, Ticket


def scheduler_of(*tickets: Ticket, patches: int = 100, images: int = 10, queued: int = 1_000) -> Scheduler[Ticket]:
    scheduler: Scheduler[Ticket] = Scheduler(
        max_batch_patches=patches, max_batch_images=images, max_queued_patches=queued
    )
    for ticket in tickets:
        assert scheduler.add(ticket)
    return scheduler


def sizes(tickets: list[Ticket]) -> list[int]:
    return [ticket.num_patches for ticket in tickets]


class Schedules(RuleBasedStateMachine):
    """``waiting`` is the model: what was taken in and has not come out, in the order it was taken in."""

    @initialize(patches=st.integers(1, 40), images=st.integers(1, 5), queued=st.integers(1, 120))
    def start(self, patches: int, images: int, queued: int) -> None:
        self.scheduler: Scheduler[Ticket] = Scheduler(
            max_batch_patches=patches, max_batch_images=images, max_queued_patches=queued
        )
        self.waiting: list[Ticket] = []
        self.gone: list[Ticket] = []
        self.now_s = 0.0

    @rule(num_patches=st.integers(1, 60), time_s=st.one_of(st.just(math.inf), st.integers(0, 20)))
    def add(self, num_patches: int, time_s: float) -> None:
        ticket = Ticket(num_patches=num_patches, deadline_s=self.now_s + time_s, enqueued_s=self.now_s)
        fits = sum(sizes(self.waiting)) + num_patches <= self.scheduler.max_queued_patches
        assert self.scheduler.add(ticket) == (fits or not self.waiting)
        if fits or not self.waiting:
            self.waiting.append(ticket)
        else:
            self.gone.append(ticket)

    @rule(seconds=st.integers(0, 15))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove_one_that_waits(self, data: st.DataObject) -> None:
        ticket = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        assert self.scheduler.remove(ticket)
        self.gone.append(ticket)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def remove_one_that_is_gone(self, data: st.DataObject) -> None:
        assert not self.scheduler.remove(data.draw(st.sampled_from(self.gone)))

    @rule()
    def next_batch(self) -> None:
        batch, expired = self.scheduler.next_batch(self.now_s)
        # First in, first out, nothing lost and nothing twice: what came out is the head of what waited, in order.
        taken = self.waiting[: len(batch) + len(expired)]
        assert batch == [ticket for ticket in taken if ticket.deadline_s > self.now_s]
        assert expired == [ticket for ticket in taken if ticket.deadline_s <= self.now_s]
        self.waiting = self.waiting[len(taken) :]
        self.gone += taken
        # Within the budgets, and not for want of trying.
        assert len(batch) <= self.scheduler.max_batch_images
        assert len(batch) == 1 or sum(sizes(batch)) <= self.scheduler.max_batch_patches
        if self.waiting and len(batch) < self.scheduler.max_batch_images:
            assert batch
            assert sum(sizes(batch)) + self.waiting[0].num_patches > self.scheduler.max_batch_patches
            assert self.waiting[0].deadline_s > self.now_s

    @invariant()
    def what_is_queued_is_counted(self) -> None:
        assert self.scheduler.queued_patches == sum(sizes(self.waiting))
        assert len(self.scheduler) == len(self.waiting)

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert len(self.waiting) <= 1 or self.scheduler.queued_patches <= self.scheduler.max_queued_patches

    def teardown(self) -> None:
        """Whatever is still queued comes out in the end."""
        while self.waiting:
            self.next_batch()
        assert self.scheduler.next_batch(self.now_s) == ([], [])


def test_random_schedules_keep_every_promise() -> None:
    run_state_machine_as_test(Schedules, settings=settings(max_examples=120, stateful_step_count=40, deadline=None))


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_without_deadlines_everything_comes_out_in_the_order_it_went_in(num_patches: list[int]) -> None:
    tickets = [Ticket(num_patches=number) for number in num_patches]
    scheduler = scheduler_of(*tickets, patches=60, images=4, queued=10**6)
    out: list[Ticket] = []
    while len(scheduler):
        out += scheduler.next_batch(0.0)[0]
    assert out == tickets


def test_an_empty_queue_gives_an_empty_batch() -> None:
    assert scheduler_of().next_batch(0.0) == ([], [])


def test_a_batch_is_filled_up_to_and_with_its_patches() -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=number) for number in (60, 40, 1)], patches=100)
    assert sizes(scheduler.next_batch(0.0)[0]) == [60, 40]


def test_a_batch_is_filled_up_to_and_with_its_images() -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=1) for _ in range(3)], images=2)
    assert [sizes(scheduler.next_batch(0.0)[0]) for _ in range(2)] == [[1, 1], [1]]


def test_a_ticket_that_does_not_fit_holds_back_smaller_ones_behind_it() -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=number) for number in (60, 50, 1)], patches=100)
    assert [sizes(scheduler.next_batch(0.0)[0]) for _ in range(2)] == [[60], [50, 1]]


def test_a_ticket_larger_than_a_batch_runs_alone() -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=number) for number in (10, 500, 10)], patches=100)
    assert [sizes(scheduler.next_batch(0.0)[0]) for _ in range(3)] == [[10], [500], [10]]


@pytest.mark.parametrize(("now_s", "runs"), [(4.9, True), (5.0, False), (5.1, False)])
def test_a_ticket_is_dropped_from_its_deadline_on(now_s: float, runs: bool) -> None:
    ticket = Ticket(num_patches=1, deadline_s=5.0)
    assert scheduler_of(ticket).next_batch(now_s) == (([ticket], []) if runs else ([], [ticket]))


def test_expired_tickets_take_no_room_in_the_batch() -> None:
    late = [Ticket(num_patches=90, deadline_s=1.0) for _ in range(3)]
    timely = [Ticket(num_patches=50), Ticket(num_patches=50)]
    scheduler = scheduler_of(late[0], timely[0], late[1], timely[1], late[2], patches=100, images=2)
    batch, expired = scheduler.next_batch(2.0)
    assert batch == timely
    assert expired == late[:2]


@pytest.mark.parametrize(("num_patches", "taken"), [(39, True), (40, True), (41, False)])
def test_the_queue_takes_tickets_up_to_and_with_its_bound(num_patches: int, taken: bool) -> None:
    scheduler = scheduler_of(Ticket(num_patches=60), queued=100)
    assert scheduler.add(Ticket(num_patches=num_patches)) is taken
    assert scheduler.queued_patches == (60 + num_patches if taken else 60)


def test_an_empty_queue_takes_a_ticket_of_any_size() -> None:
    scheduler = scheduler_of(queued=100)
    assert scheduler.add(Ticket(num_patches=5_000))
    assert not scheduler.add(Ticket(num_patches=1))


def test_a_removed_ticket_makes_room_and_never_runs() -> None:
    first, second = Ticket(num_patches=60), Ticket(num_patches=60)
    scheduler = scheduler_of(first, queued=100)
    assert scheduler.remove(first)
    assert scheduler.add(second)
    assert scheduler.next_batch(0.0) == ([second], [])


def test_of_two_equal_tickets_the_very_one_is_removed() -> None:
    first, second = Ticket(num_patches=1), Ticket(num_patches=1)
    scheduler = scheduler_of(first, second)
    assert scheduler.remove(second)
    assert scheduler.next_batch(0.0)[0][0] is first


def test_a_ticket_that_was_never_added_is_not_removed() -> None:
    scheduler = scheduler_of(Ticket(num_patches=1))
    assert not scheduler.remove(Ticket(num_patches=1))
    assert len(scheduler) == 1
