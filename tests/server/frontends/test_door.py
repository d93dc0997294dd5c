"""A call is refused in a front end exactly when, and as, it would be where the device is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from encoder_svc.engine.admission import Admission
from encoder_svc.engine.load import Budgets
from encoder_svc.server.frontends.door import DoorSign, DoorSignReader
from encoder_svc.transport.arena import new_shared_file

if TYPE_CHECKING:
    from collections.abc import Iterator

BUDGETS = Budgets(max_queued_patches=100, max_inflight_images=5, max_inflight_bytes=1000)


@pytest.fixture
def file() -> Iterator[int]:
    file = new_shared_file("door")
    yield file
    os.close(file)


@pytest.fixture
def admission(file: int) -> Admission:
    admission = Admission(BUDGETS, lambda: 0.0)
    admission.on_change = DoorSign(file).write
    return admission


@pytest.fixture
def reader(admission: Admission, file: int) -> DoorSignReader:
    assert admission.on_change is not None
    return DoorSignReader(file, BUDGETS, 2)


def test_a_door_that_nobody_came_through_is_open(reader: DoorSignReader) -> None:
    assert reader.refusal() is None


@pytest.mark.parametrize(
    ("images", "num_bytes", "patches", "reason"),
    [(5, 10, 50, "INFLIGHT_IMAGES"), (1, 1000, 50, "INFLIGHT_BYTES"), (1, 10, 100, "QUEUE_FULL"), (1, 10, 50, None)],
)
def test_it_says_what_admission_says(
    admission: Admission, reader: DoorSignReader, images: int, num_bytes: int, patches: int, reason: str | None
) -> None:
    admission.admit(num_images=images, num_bytes=num_bytes).reserve(patches, 60.0)
    here, there = admission.refusal_at_the_door(), reader.refusal()
    assert (here and here.reason) == (there and there.reason) == reason
    if here and there:
        assert (here.message, here.retry_after_s) == (there.message, there.retry_after_s)


def test_it_opens_again(admission: Admission, reader: DoorSignReader) -> None:
    grant = admission.admit(num_images=5, num_bytes=10)
    assert reader.refusal() is not None
    grant.close()
    assert reader.refusal() is None


@pytest.mark.parametrize(
    ("pending", "ahead", "is_so"),
    [
        ((0, 0, 0), (1, 1, 200), True),
        ((2, 500, 50), (0, 0, 0), True),
        ((3, 500, 50), (0, 0, 0), False),
        ((1, 501, 50), (0, 0, 0), False),
        ((1, 500, 51), (0, 0, 0), False),
        ((1, 10, 10), (0, 1, 0), False),  # of each of two front ends
        ((1, 300, 10), (0, 0, 101), False),
        ((1, 10, 30), (6, 0, 0), True),
        ((1, 10, 40), (6, 0, 0), False),
    ],
)
def test_it_says_whether_there_is_room_for_twice_as_much(
    admission: Admission,
    reader: DoorSignReader,
    pending: tuple[int, int, int],
    ahead: tuple[int, int, int],
    is_so: bool,
) -> None:
    images, num_bytes, patches = pending
    if images:
        admission.admit(num_images=images, num_bytes=num_bytes).reserve(patches, 60.0)
    num_requests, num_images, ahead_bytes = ahead
    assert reader.is_half_empty(num_requests=num_requests, num_images=num_images, num_bytes=ahead_bytes) is is_so
