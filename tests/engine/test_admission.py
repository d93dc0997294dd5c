"""Admission and the rate it predicts by, on a clock of the tests' own."""

from __future__ import annotations

import math
import re

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

from encoder_svc.engine.admission import Admission, Grant
from encoder_svc.engine.load import Budgets
from encoder_svc.engine.throughput import ThroughputMeter
from encoder_svc.errors import DeadlineError, OverloadedError, RequestError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock | None = None, *, patches: int = 100, images: int = 10, num_bytes: int = 1000) -> Admission:
    budgets = Budgets(max_queued_patches=patches, max_inflight_images=images, max_inflight_bytes=num_bytes)
    return Admission(budgets, clock or Clock())


def measured(clock: Clock, patches_per_s: int, *, seconds: float = 1.0, **bounds: int) -> Admission:
    """An admission that has seen one request through at a rate."""
    seen = admission(clock, **bounds)
    grant, num_patches = seen.admit(num_images=1, num_bytes=1), round(patches_per_s * seconds)
    grant.reserve(num_patches, math.inf)
    clock.now_s += seconds
    grant.image_done(num_patches, completed=True)
    grant.close()
    return seen


@pytest.mark.parametrize(
    ("request_", "reason"),
    [((8, 1), "INFLIGHT_IMAGES"), ((1, 600), "INFLIGHT_BYTES")],
)
def test_beyond_a_budget_a_request_is_refused_with_a_delay(request_: tuple[int, int], reason: str) -> None:
    busy = admission()
    busy.admit(num_images=5, num_bytes=500)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=request_[0], num_bytes=request_[1])
    assert caught.value.reason == reason
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


@pytest.mark.parametrize(
    ("pending", "more", "why"),
    [
        (40, 70, "There are 40 patches pending, this request adds 70, and 100 are allowed. Try again in about"),
        (150, 1, "There are 150 patches pending, and no more are taken until there are fewer than 100. Try again"),
    ],
)
def test_a_refusal_says_what_is_pending_what_was_asked_for_and_what_is_allowed(
    pending: int, more: int, why: str
) -> None:
    busy = admission()
    requests = [busy.admit(num_images=1, num_bytes=1) for _ in range(2)]
    requests[0].reserve(pending, math.inf)
    with pytest.raises(OverloadedError) as caught:
        requests[1].reserve(more, math.inf)
    assert caught.value.message.startswith(why)


def test_a_refusal_by_estimate_says_so() -> None:
    refusal = filled(81, mean=20).refusal_at_the_door()
    assert refusal is not None
    assert re.match(r"There are about 81 patches pending, this request adds about 2\d, and 100 are al", refusal.message)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ((8, 1), "There are 5 images pending, this request adds 8, and 10 are allowed."),
        ((1, 600), "There are 500 bytes pending, this request adds 600, and 1000 are allowed."),
    ],
)
def test_so_does_one_of_images_and_of_bytes(more: tuple[int, int], why: str) -> None:
    busy = admission()
    busy.admit(num_images=5, num_bytes=500)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=more[0], num_bytes=more[1])
    assert caught.value.message.startswith(why)


def test_a_full_queue_refuses_before_anything_is_looked_at() -> None:
    busy = admission()
    busy.admit(num_images=1, num_bytes=1).reserve(100, math.inf)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=1, num_bytes=1)
    assert caught.value.reason == "QUEUE_FULL"


def test_an_idle_service_takes_one_request_of_any_size() -> None:
    idle = admission()
    grant = idle.admit(num_images=50, num_bytes=50_000)
    grant.reserve(5_000, math.inf)
    grant.close()
    assert (idle.pending_images, idle.pending_bytes, idle.pending_patches, idle.num_requests) == (0, 0, 0, 0)


def test_patches_beyond_the_budget_are_refused_with_the_time_their_excess_takes() -> None:
    clock = Clock()
    busy = measured(clock, 50)
    busy.admit(num_images=1, num_bytes=1).reserve(80, math.inf)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=1, num_bytes=1).reserve(40, math.inf)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s == pytest.approx(20 / 50)


def test_a_deadline_that_the_rate_cannot_meet_is_refused() -> None:
    clock = Clock()
    busy = measured(clock, 50, patches=1000)
    with pytest.raises(DeadlineError):
        busy.admit(num_images=1, num_bytes=1).reserve(60, 1.0)


@pytest.mark.parametrize(
    ("patches", "remaining_s", "why"),
    [
        (6, 0.0081, "about 60 ms now and has 8.1 ms left."),
        (10, -1.0, "about 100 ms now and has 0.0 ms left."),
        (2000, 1.5, "about 20.0 s now and has 1500 ms left."),
    ],
)
def test_a_deadline_s_refusal_has_numbers_that_say_something(patches: int, remaining_s: float, why: str) -> None:
    busy = measured(Clock(), 100, seconds=4.0, patches=10_000)
    with pytest.raises(DeadlineError) as caught:
        busy.admit(num_images=1, num_bytes=1).reserve(patches, remaining_s)
    assert caught.value.message.endswith(why)


def test_a_small_request_need_not_wait_for_all_of_a_big_one() -> None:
    clock = Clock()
    busy = measured(clock, 50, patches=1000)
    busy.admit(num_images=1, num_bytes=1).reserve(900, math.inf)
    busy.admit(num_images=1, num_bytes=1).reserve(10, 1.0)


def test_before_anything_was_measured_no_deadline_is_refused() -> None:
    admission().admit(num_images=1, num_bytes=1).reserve(10**9, 1e-3)


def after_small_images(clock: Clock) -> Admission:
    """One of 16 patches after the other, 1.6 ms each."""
    quiet = measured(clock, 16, patches=100_000)
    for _ in range(1_000):
        grant = quiet.admit(num_images=1, num_bytes=1)
        grant.reserve(16, math.inf)
        clock.now_s += 0.0016
        grant.image_done(16, completed=True)
        grant.close()
    return quiet


def test_many_patches_are_not_refused_by_the_rate_of_few() -> None:
    after_small_images(Clock()).admit(num_images=1, num_bytes=1).reserve(80_000, 1.0)


def test_a_crowd_is_not_sent_away_for_long_by_the_rate_of_few() -> None:
    clock = Clock()
    busy = after_small_images(clock)
    first = busy.admit(num_images=2, num_bytes=1)
    first.reserve(100_000, math.inf)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=1, num_bytes=1).reserve(60_000, math.inf)
    assert caught.value.retry_after_s == 0.05  # 60,000 patches at that rate: 6 s
    clock.now_s += 1.0
    first.image_done(50_000, completed=True)
    with pytest.raises(OverloadedError) as caught:
        busy.admit(num_images=1, num_bytes=1).reserve(100_000, math.inf)
    assert caught.value.retry_after_s == pytest.approx(50_000 / busy.load().patches_per_s)


def test_the_rate_is_patches_over_busy_seconds() -> None:
    meter = ThroughputMeter()
    assert meter.patches_per_s is None
    assert meter.least_s(1000) == 0
    for began_s in (0.0, 1_000.0):
        meter.pass_time(began_s, 0)
        meter.pass_time(began_s + 1.0, 30)
        meter.leave(30, done=True)
    assert meter.patches_per_s == pytest.approx(30)
    assert meter.least_s(60) == pytest.approx(2)


def test_no_more_is_foreseen_than_eight_times_what_was_pending() -> None:
    meter = ThroughputMeter()
    for now_s, pending in ((1.0, 40), (2.0, 20)):
        meter.pass_time(now_s, pending)
        meter.leave(20, done=True)
    assert meter.patches_per_s == pytest.approx(20, rel=0.1)
    assert meter.least_s(10**9) == pytest.approx(8 * 30 / 20, rel=0.1)


def test_what_has_just_come_says_nothing_until_something_leaves() -> None:
    meter = ThroughputMeter()
    meter.pass_time(0.016, 16)
    meter.leave(16, done=True)
    meter.pass_time(1.0, 0)
    meter.pass_time(2.0, 200_000)
    assert meter.patches_per_s == pytest.approx(1_000)
    assert meter.least_s(200_000) == pytest.approx(8 * 0.016)


def test_what_leaves_without_having_been_encoded_takes_its_time_alone() -> None:
    meter = ThroughputMeter()
    for now_s, pending, done in ((1.0, 60, True), (2.0, 30, False)):
        meter.pass_time(now_s, pending)
        meter.leave(30, done=done)
    assert meter.patches_per_s == pytest.approx(15, rel=0.1)


def test_the_rate_follows_a_change() -> None:
    meter = ThroughputMeter()
    for second in range(200):
        patches = 100 if second < 100 else 10
        meter.pass_time(second + 1.0, patches)
        meter.leave(patches, done=True)
    assert meter.patches_per_s == pytest.approx(10, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-4, 10)), min_size=1))
def test_the_rate_lies_between_the_slowest_and_the_fastest(steps: list[tuple[int, float]]) -> None:
    meter, now_s = ThroughputMeter(), 0.0
    pending = sum(patches for patches, _ in steps)
    for patches, seconds in steps:
        now_s += seconds
        meter.pass_time(now_s, pending)
        meter.leave(patches, done=True)
        pending -= patches
    rates = [patches / seconds for patches, seconds in steps]
    assert meter.patches_per_s is not None
    # The newest step counts in full, the time before it decayed: allow for what one step decays by.
    assert min(rates) * 0.999 <= meter.patches_per_s <= max(rates) * 8


class Admissions(RuleBasedStateMachine):
    """Requests come, are refused or let in, finish image by image, or break off; the books always balance."""

    @initialize(patches=st.integers(1, 200), images=st.integers(1, 20), num_bytes=st.integers(1, 300))
    def start(self, patches: int, images: int, num_bytes: int) -> None:
        self.clock = Clock()
        self.admission = admission(self.clock, patches=patches, images=images, num_bytes=num_bytes)
        self.open: list[tuple[Grant, list[int], int]] = []

    @rule(images=st.lists(st.integers(1, 50), min_size=1, max_size=6), num_bytes=st.integers(1, 100))
    def request(self, images: list[int], num_bytes: int) -> None:
        try:
            grant = self.admission.admit(num_images=len(images), num_bytes=num_bytes)
        except RequestError as error:
            assert error.retry_after_s is not None
            assert self.open
            return
        try:
            grant.reserve(sum(images), math.inf)
        except RequestError:
            grant.close()
            return
        self.open.append((grant, list(images), num_bytes))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), completed=st.booleans(), seconds=st.floats(0, 2))
    def an_image_leaves(self, data: st.DataObject, completed: bool, seconds: float) -> None:
        self.clock.now_s += seconds
        grant, images, _ = data.draw(st.sampled_from(self.open))
        if images:
            grant.image_done(images.pop(), completed=completed)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        grant, _, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        grant.close()

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "admission"):
            return
        assert self.admission.pending_patches == sum(sum(images) for _, images, _ in self.open)
        assert self.admission.pending_images == sum(len(images) for _, images, _ in self.open)
        assert self.admission.pending_bytes == sum(num_bytes for _, _, num_bytes in self.open)
        assert self.admission.num_requests == len(self.open)

    @invariant()
    def the_budgets_hold(self) -> None:
        if hasattr(self, "admission") and len(self.open) > 1:
            budgets = self.admission.budgets
            first = max(sum(images) for _, images, _ in self.open)
            assert self.admission.pending_patches <= max(budgets.max_queued_patches, first) + first
            assert self.admission.pending_bytes <= budgets.max_inflight_bytes + 100


def test_random_requests_keep_the_books() -> None:
    run_state_machine_as_test(Admissions, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))


def filled(pending: int, *, mean: int, patches: int = 100) -> Admission:
    """An admission that has so much pending, and has seen requests of one image of ``mean`` patches."""
    seen = admission(patches=patches)
    for _ in range(200):
        grant = seen.admit(num_images=1, num_bytes=1)
        grant.reserve(mean, math.inf)
        grant.close()
    seen.admit(num_images=1, num_bytes=1).reserve(pending, math.inf)
    return seen


@pytest.mark.parametrize(("pending", "refused"), [(70, False), (81, True)])
def test_at_the_door_a_request_counts_with_what_others_made(pending: int, refused: bool) -> None:
    refusal = filled(pending, mean=20).refusal_at_the_door()
    assert (refusal is not None) == refused
    assert refusal is None or (refusal.reason == "QUEUE_FULL" and refusal.retry_after_s)


def test_requests_whose_headers_are_being_read_count_as_well() -> None:
    busy = filled(50, mean=20)
    busy.admit(num_images=2, num_bytes=1)
    with pytest.raises(OverloadedError):
        busy.admit(num_images=1, num_bytes=1)


def test_what_was_expected_gives_way_to_what_is_known() -> None:
    busy = filled(50, mean=20)
    grant = busy.admit(num_images=2, num_bytes=1)
    grant.reserve(1, math.inf)
    assert (busy.expected_patches, busy.pending_patches) == (0, 51)
    grant.close()
    assert (busy.expected_patches, busy.pending_patches) == (0, 50)


def test_a_queue_that_is_not_half_full_refuses_nobody_by_estimate() -> None:
    busy = filled(50, mean=90)
    busy.admit(num_images=5, num_bytes=1).reserve(50, math.inf)


@pytest.mark.parametrize(
    ("images", "num_bytes", "reason"), [(10, 1, "INFLIGHT_IMAGES"), (1, 1000, "INFLIGHT_BYTES"), (9, 999, None)]
)
def test_at_the_door_full_budgets_refuse(images: int, num_bytes: int, reason: str | None) -> None:
    busy = admission()
    busy.admit(num_images=images, num_bytes=num_bytes)
    refusal = busy.refusal_at_the_door()
    assert (refusal.reason if refusal else None) == reason
