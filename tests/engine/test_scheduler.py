"""The scheduler against a model of it, over random schedules on a clock of the test's own, and its rules by example."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass

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


def scheduler_of(*tickets: Ticket, patches: int = 100, images: int = 10) -> Scheduler[Ticket]:
    scheduler: Scheduler[Ticket] = Scheduler(max_batch_patches=patches, max_batch_images=images)
    for ticket in tickets:
        scheduler.add(ticket)
    return scheduler


def sizes(tickets: list[Ticket]) -> list[int]:
    return [ticket.num_patches for ticket in tickets]


class Schedules(RuleBasedStateMachine):
    """``waiting`` is the model: what was taken in and has not come out, in the order it was taken in."""

    @initialize(patches=st.integers(1, 40), images=st.integers(1, 5))
    def start(self, patches: int, images: int) -> None:
        self.scheduler: Scheduler[Ticket] = Scheduler(max_batch_patches=patches, max_batch_images=images)
        self.waiting: list[Ticket] = []
        self.gone: list[Ticket] = []
        self.now_s = 0.0

    @rule(
        num_patches=st.integers(1, 60),
        flow=st.sampled_from(["a", "b", "c", None]),
        time_s=st.one_of(st.just(math.inf), st.integers(0, 20)),
    )
    def add(self, num_patches: int, flow: str | None, time_s: float) -> None:
        ticket = Ticket(num_patches=num_patches, flow=flow, deadline_s=self.now_s + time_s, enqueued_s=self.now_s)
        self.scheduler.add(ticket)
        self.waiting.append(ticket)

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

    @rule(at_most=st.integers(0, 40))
    def fill_a_gap(self, at_most: int) -> None:
        batch, expired = self.scheduler.next_batch(self.now_s, at_most)
        assert set(expired) == {ticket for ticket in self.waiting if ticket.deadline_s <= self.now_s}
        left = [ticket for ticket in self.waiting if ticket.deadline_s > self.now_s]
        assert sum(sizes(batch)) <= at_most
        for flow in ("a", "b", "c"):
            taken = [ticket for ticket in batch if ticket.flow == flow]
            assert taken == [ticket for ticket in left if ticket.flow == flow][: len(taken)]
        self.gone += expired + batch
        self.waiting = [ticket for ticket in left if ticket not in batch]

    @rule(num_sharers=st.integers(1, 3))
    def next_batch(self, num_sharers: int = 1) -> None:
        batch, expired = self.scheduler.next_batch(self.now_s, num_sharers=num_sharers)
        # Nothing lost, nothing twice, and every ticket whose time is up is dropped at once, wherever it waited.
        assert set(expired) == {ticket for ticket in self.waiting if ticket.deadline_s <= self.now_s}
        left = [ticket for ticket in self.waiting if ticket.deadline_s > self.now_s]
        assert len(batch) == len(set(batch)) == len(set(batch) & set(left))
        # Images of one flow keep their order.
        for flow in ("a", "b", "c"):
            taken = [ticket for ticket in batch if ticket.flow == flow]
            assert taken == [ticket for ticket in left if ticket.flow == flow][: len(taken)]
        share = math.ceil(sum(sizes(left)) / num_sharers)
        self.gone += expired + batch
        self.waiting = [ticket for ticket in left if ticket not in batch]
        # Within the budgets, and not for want of trying.
        assert len(batch) <= self.scheduler.max_batch_images
        budget = min(self.scheduler.max_batch_patches, share)
        assert len(batch) <= 1 or sum(sizes(batch)) <= budget
        if self.waiting and len(batch) < self.scheduler.max_batch_images:
            assert batch
            longer = sum(sizes(batch)) + max(sizes(self.waiting))
            assert longer > min(budget, 3 * sum(sizes(batch)))

    @invariant()
    def what_is_queued_is_counted(self) -> None:
        assert self.scheduler.queued_patches == sum(sizes(self.waiting))
        assert len(self.scheduler) == len(self.waiting)

    @invariant()
    def nothing_that_is_gone_is_kept(self) -> None:
        assert len(self.scheduler._by_turn) <= 2 * len(self.waiting) + 16 + len(self.gone[-16:])
        assert len(self.scheduler._flows) <= 3

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
    scheduler = scheduler_of(*tickets, patches=60, images=4)
    out: list[Ticket] = []
    while len(scheduler):
        out += scheduler.next_batch(0.0)[0]
    assert out == tickets


@pytest.mark.parametrize(
    ("num_patches", "num_sharers", "batches"),
    [
        ([10] * 4, 2, [[10, 10], [10, 10]]),
        ([10] * 3, 2, [[10], [10, 10]]),
        ([30, 10], 2, [[30], [10]]),
        ([10], 2, [[10]]),
    ],
)
def test_devices_that_are_all_free_share_what_waits(
    num_patches: list[int], num_sharers: int, batches: list[list[int]]
) -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=number) for number in num_patches])
    seen = []
    for left in range(num_sharers, 0, -1):
        seen.append(sizes(scheduler.next_batch(0.0, num_sharers=left)[0]))
    assert [batch for batch in seen if batch] == batches


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
    assert expired == late


def test_a_removed_ticket_never_runs() -> None:
    first, second = Ticket(num_patches=60), Ticket(num_patches=60)
    scheduler = scheduler_of(first, second)
    assert scheduler.remove(first)
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


def test_a_small_request_goes_before_what_a_big_one_still_has_waiting() -> None:
    big = [Ticket(num_patches=100, flow="big") for _ in range(8)]
    scheduler = scheduler_of(*big, patches=100, images=1)
    assert scheduler.next_batch(0.0)[0] == big[:1]
    small = Ticket(num_patches=10, flow="small")
    scheduler.add(small)
    order = [scheduler.next_batch(0.0)[0][0] for _ in range(3)]
    assert order.index(small) <= 1


def test_of_two_that_came_together_the_one_with_less_time_goes_first() -> None:
    patient, pressed = Ticket(num_patches=1), Ticket(num_patches=1, deadline_s=9.0)
    assert scheduler_of(patient, pressed, images=1).next_batch(0.0)[0] == [pressed]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=30, max_size=60), min_size=2, max_size=4),
    st.integers(1, 120),
    st.integers(1, 6),
)
def test_flows_that_both_wait_get_equal_shares(flows: list[list[int]], patches: int, images: int) -> None:
    """Start-time fair queueing's bound: while two flows wait, their served patches differ by at most their largest
    tickets; here a batch may be cut at any point, which adds nothing."""
    tickets = [[Ticket(num_patches=n, flow=index) for n in flow] for index, flow in enumerate(flows)]
    scheduler = scheduler_of(*[t for flow in tickets for t in flow], patches=patches, images=images)
    served = [0] * len(flows)
    left = [len(flow) for flow in flows]
    while len(scheduler):
        for ticket in scheduler.next_batch(0.0)[0]:
            served[ticket.flow] += ticket.num_patches
            left[ticket.flow] -= 1
            waiting = [index for index in range(len(flows)) if left[index]]
            for one in waiting:
                for other in waiting:
                    assert abs(served[one] - served[other]) <= max(flows[one]) + max(flows[other])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_waiting_is_bounded_whatever_comes_after(own: int, others: list[int]) -> None:
    """An image goes once each flow that waits has had at most one more turn, however much keeps coming."""
    scheduler = scheduler_of(*[Ticket(num_patches=n, flow=i) for i, n in enumerate(others)], patches=1, images=1)
    mine = Ticket(num_patches=own, flow="mine")
    scheduler.add(mine)
    turns = 0
    while True:
        [ticket], _ = scheduler.next_batch(0.0)
        if ticket is mine:
            break
        turns += 1
        scheduler.add(Ticket(num_patches=others[ticket.flow], flow=ticket.flow))
    assert turns <= len(others)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_new_requests_do_not_hold_an_old_one_back_for_ever(own: int, new: int, waiting: int) -> None:
    """An image that follows another of its request has its turn once each that waits beside it has had as much."""
    scheduler = scheduler_of(*[Ticket(num_patches=own, flow="old") for _ in range(2)], patches=1, images=1)
    for _ in range(waiting):
        scheduler.add(Ticket(num_patches=new))
    turns_of_others = 0
    old = 0
    while old < 2:
        [ticket], _ = scheduler.next_batch(0.0)
        if ticket.flow == "old":
            old += 1
        else:
            turns_of_others += 1
            scheduler.add(Ticket(num_patches=new))
    assert turns_of_others * new <= (waiting + 1) * (own + 2 * new)


@pytest.mark.parametrize(
    ("sizes_", "batch"),
    [
        ([10, 90], [10]),  # the large one would make the batch ten times as long
        ([10, 20, 60], [10, 20, 60]),
        ([90, 10], [90, 10]),  # the small one would wait for the large one anyhow
        ([2, 10], [2, 10]),  # both together are short
    ],
)
def test_a_large_image_does_not_join_a_batch_of_small_ones(sizes_: list[int], batch: list[int]) -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=n) for n in sizes_])
    assert sizes(scheduler.next_batch(0.0)[0]) == batch


@pytest.mark.parametrize(
    ("waiting", "batch"),
    [
        ([("a", 50), ("b", 5), ("c", 5)], [("b", 5), ("c", 5)]),
        ([("a", 5), ("b", 50), ("c", 5)], [("a", 5), ("c", 5)]),
        ([("a", 50), ("a", 5), ("b", 5)], [("b", 5)]),  # images of one request keep their order
        ([("a", 8), ("b", 8), ("c", 2)], [("a", 8), ("c", 2)]),
        ([("a", 50), ("b", 60)], []),
        ([*((f"large {n}", 50) for n in range(17)), ("b", 5)], []),  # the search has an end
    ],
)
def test_what_is_too_large_for_a_gap_keeps_its_turn_and_lets_others_go(
    waiting: list[tuple[str, int]], batch: list[tuple[str, int]]
) -> None:
    scheduler = scheduler_of(*[Ticket(num_patches=number, flow=flow) for flow, number in waiting])
    taken = scheduler.next_batch(0.0, 10)[0]
    assert [(ticket.flow, ticket.num_patches) for ticket in taken] == batch
    left = [one for one in waiting if one not in batch]
    seen = []
    while len(scheduler):
        seen += scheduler.next_batch(0.0)[0]
    assert {(ticket.flow, ticket.num_patches) for ticket in seen} == set(left)
    assert (seen[0].flow, seen[0].num_patches) == left[0]


@pytest.mark.parametrize("leaves", ["in a batch", "removed", "expired"])
def test_what_left_the_queue_is_not_kept_until_its_deadline(leaves: str) -> None:
    @dataclass(eq=False, kw_only=True, slots=True, weakref_slot=True)
    class Watched(Ticket):
        pass

    class Flow:
        pass

    scheduler: Scheduler[Watched] = Scheduler(max_batch_patches=10, max_batch_images=10)
    left: list[weakref.ref[object]] = []
    for _ in range(20):
        ticket = Watched(num_patches=1, flow=Flow(), deadline_s=1e9)
        scheduler.add(ticket)
        left += [weakref.ref(ticket), weakref.ref(ticket.flow)]
        if leaves == "removed":
            scheduler.remove(ticket)
        else:
            batch, expired = scheduler.next_batch(0.0 if leaves == "in a batch" else 1e9)
            assert batch + expired == [ticket]
            del batch, expired
        del ticket
    gc.collect()
    assert [one for one in left if one() is not None] == []


def test_places_of_what_left_do_not_outnumber_what_waits() -> None:
    scheduler = scheduler_of(*(Ticket(num_patches=60) for _ in range(3)))
    for _ in range(200):
        ticket = Ticket(num_patches=1, deadline_s=1e9)
        scheduler.add(ticket)
        scheduler.remove(ticket)
    assert len(scheduler._by_turn) + len(scheduler._by_deadline) < 50
