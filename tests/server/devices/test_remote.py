"""A device in another process as the engine sees it; the other process is the test."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from encoder_svc.engine.device import BatchResult
from encoder_svc.errors import AttentionKernelError
from encoder_svc.images.types import DecodedImage, EncoderImage, GridThw, ProcessedImage
from encoder_svc.server.devices.remote import RemoteDevice
from encoder_svc.server.shared_images import image_of
from encoder_svc.transport.arena import Arena, ArenaView, new_shared_file

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW_BYTES = 6
TIMES = {"build_s": 0.1, "h2d_s": 0.2, "resize_s": 0.3, "forward_s": 0.4, "d2h_s": 0.5, "split_s": 0.6}


@dataclass
class There:
    """The process's end."""

    link: Connection
    images: ArenaView
    embeddings: ArenaView
    last: dict[str, Any] | None = None

    def take(self) -> list[EncoderImage]:
        """The next batch."""
        self.last = json.loads(self.link.recv_bytes())
        return [image_of(fields, self.images.view) for fields in self.last["images"]]

    def answer(self, *, are_finite: list[bool]) -> None:
        """Each image's embeddings are its number from 1 on, in every byte."""
        for number, (offset, num_bytes) in enumerate(self.last["rows"], 1):
            self.embeddings.view(offset, num_bytes)[:] = bytes([number]) * num_bytes
        self._say(result={"are_finite": are_finite, **TIMES})

    def fail(self, **error: object) -> None:
        self._say(error={"text": "its words", "out_of_memory": False, "kernel": None, **error})

    def _say(self, **said: object) -> None:
        self.link.send_bytes(json.dumps({"batch": self.last["batch"], **said}).encode())


@dataclass
class Both:
    device: RemoteDevice
    there: There
    arenas: tuple[Arena, Arena]


@pytest.fixture
def both() -> Iterator[Both]:
    files = new_shared_file("images"), new_shared_file("embeddings")
    images, embeddings = (Arena(file, 2**16) for file in files)
    ours, theirs = Pipe()
    device = RemoteDevice(ours, images, embeddings, row_bytes=ROW_BYTES, merge_size=2)
    yield Both(device, There(theirs, *(ArenaView(file, writable=True) for file in files)), (images, embeddings))
    theirs.close()
    device._listener.join(10)
    for file in files:
        os.close(file)


def patches(side: int, dtype: type = np.uint8) -> ProcessedImage:
    values = np.arange(side * side * 12).reshape(side * side, 3, 2, 2).astype(dtype)
    return ProcessedImage(GridThw(1, side, side), values, 0.1, 0.2)


def test_a_batch_goes_there_and_its_rows_come_back(both: Both) -> None:
    sent: list[EncoderImage] = [
        patches(2),
        patches(4, np.float32),
        DecodedImage(GridThw(1, 2, 2), np.ones((5, 3, 3), np.uint8)),
    ]
    submitted = both.device.submit(sent)
    taken = both.there.take()
    assert [(type(image), image.grid) for image in taken] == [(type(image), image.grid) for image in sent]
    np.testing.assert_array_equal(taken[1].patches, sent[1].patches)
    np.testing.assert_array_equal(taken[2].pixels, sent[2].pixels)
    both.there.answer(are_finite=[True, True, False])
    submitted.wait_until_computed()
    rows = [b"\x01" * ROW_BYTES, b"\x02" * ROW_BYTES * 4, None]
    result = submitted.wait()
    assert [data and bytes(data) for data in result.embeddings] == rows
    assert result == BatchResult(result.embeddings, **TIMES)


def test_what_a_batch_took_is_free_once_nobody_reads_its_rows(both: Both) -> None:
    submitted = both.device.submit([patches(2)])
    both.there.take()
    assert all(arena.taken_bytes for arena in both.arenas)
    both.there.answer(are_finite=[True])
    result = submitted.wait()
    del submitted
    assert both.arenas[0].taken_bytes == 0
    assert both.arenas[1].taken_bytes > 0
    del result
    assert both.arenas[1].taken_bytes == 0


def test_a_short_batch_may_be_answered_before_a_long_one(both: Both) -> None:
    long, short = both.device.submit([patches(4)]), None
    both.there.take()
    first = both.there.last
    short = both.device.submit([patches(2)])
    both.there.take()
    both.there.answer(are_finite=[True])
    assert len(short.wait().embeddings[0]) == ROW_BYTES
    both.there.last = first
    both.there.answer(are_finite=[True])
    assert len(long.wait().embeddings[0]) == 4 * ROW_BYTES


def test_only_what_is_shorter_than_a_batch_that_runs_goes_beside_it(both: Both) -> None:
    seen = []
    for side in (2, 4, 2, 4, 8):
        both.device.submit([patches(side)])
        both.there.take()
        seen.append(both.there.last["is_beside"])
    assert seen == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("said", "raised", "out_of_memory"),
    [
        ({}, RuntimeError("its words"), False),
        ({"out_of_memory": True}, MemoryError("its words"), True),
        ({"kernel": ["FLASH_ATTN", "fa4", "why"]}, AttentionKernelError("FLASH_ATTN", "fa4", "why"), False),
        ({"kernel": ["FLASH_ATTN", "fa4", "why"], "out_of_memory": True}, MemoryError("its words"), True),
    ],
)
def test_what_the_device_raised_is_raised_here(
    both: Both, said: dict[str, object], raised: Exception, *, out_of_memory: bool
) -> None:
    submitted = both.device.submit([patches(2)])
    both.there.take()
    both.there.fail(**said)
    submitted.wait_until_computed()
    with pytest.raises(type(raised)) as caught:
        submitted.wait()
    assert str(caught.value) == str(raised)
    assert both.device.is_out_of_memory(caught.value) == out_of_memory
    assert not both.device.is_broken()


@pytest.mark.parametrize("told", ["before", "after"])
def test_a_process_that_ends_fails_its_batches_and_is_told_once(both: Both, told: str) -> None:
    submitted = both.device.submit([patches(2)])
    lost = threading.Semaphore(0)
    if told == "before":
        both.device.call_when_lost(lost.release)
    both.there.link.close()
    with pytest.raises(RuntimeError, match="the process of the device ended"):
        submitted.wait()
    both.device._listener.join(10)
    if told == "after":
        both.device.call_when_lost(lost.release)
    assert lost.acquire(timeout=10)
    assert not lost.acquire(blocking=False)
    assert both.device.is_broken()
    with pytest.raises(RuntimeError, match="the process of the device ended"):
        both.device.submit([patches(2)])
