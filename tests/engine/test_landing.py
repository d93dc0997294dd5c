"""Page-locked parts of memory that processes share."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from encoder_svc.engine import landing as module
from encoder_svc.engine import runner as runner_module
from encoder_svc.engine.landing import CudaPages, Landing, copy_bytes, pieces
from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.images.types import GridThw, ProcessedImage
from encoder_svc.transport.arena import Arena, ArenaView, new_shared_file
from tests.models.towers import FAMILIES, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STEP = 1 << 16


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    monkeypatch.setattr(module, "_STEP_BYTES", STEP)
    monkeypatch.setattr(module, "_AHEAD_BYTES", 0)
    file = new_shared_file("test")
    yield Arena(file, 4 * STEP + 4096)
    os.close(file)


class Locks:
    """Notes what is locked."""

    def __init__(self) -> None:
        self.pages: list[tuple[int, int]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def lock(self, address: int, num_bytes: int) -> None:
        self.go_on.wait(10)
        self.pages.append((address, num_bytes))

    def unlock(self, address: int) -> None:
        self.pages.remove(next(locked for locked in self.pages if locked[0] == address))


class FakeStream:
    """Notes how much of the arena is taken when it is waited for."""

    def __init__(self, arena: Arena) -> None:
        self.taken_bytes: list[int] = []
        self._arena = arena

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        self.taken_bytes.append(self._arena.taken_bytes)


def until(is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.005)


def test_nothing_lands_where_pages_are_not_locked_yet(arena: Arena) -> None:
    locks = Locks()
    locks.go_on.clear()
    landing = Landing(arena, locks)
    assert landing.take([100]) is None
    assert landing.take([100]) is None
    assert arena.taken_bytes == 0
    locks.go_on.set()
    until(lambda: landing.locked_bytes == STEP)
    assert locks.pages == [(arena.address, STEP)]


def test_what_is_locked_is_dealt_out(arena: Arena) -> None:
    landing = Landing(arena, Locks())
    landing.take([100])
    until(lambda: landing.locked_bytes == STEP)
    blocks = landing.take([STEP // 2, STEP // 2])
    assert blocks is not None
    assert all(map(arena.holds, blocks))
    assert [arena.offset(block) for block in blocks] == [0, STEP // 2]


def test_more_is_locked_as_more_is_used(arena: Arena) -> None:
    locks = Locks()
    landing = Landing(arena, locks)
    kept = arena.take(3 * STEP - 64)
    assert landing.take([100]) is None  # past the third step
    until(lambda: landing.locked_bytes == 4 * STEP)
    assert [size for _, size in locks.pages] == [STEP] * 4
    assert landing.take([100]) is not None
    assert len(kept) == 3 * STEP - 64


def test_more_is_locked_than_is_used(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AHEAD_BYTES", STEP)
    landing = Landing(arena, Locks())
    until(lambda: landing.locked_bytes == STEP)  # though nothing is used
    kept = landing.take([64])
    assert kept is not None
    until(lambda: landing.locked_bytes == 2 * STEP)


@pytest.mark.parametrize(
    ("start", "num_bytes", "wanted"),
    [(0, 10, [10]), (0, 100, [100]), (90, 10, [10]), (90, 11, [10, 1]), (150, 300, [50, 100, 100, 50]), (200, 1, [1])],
)
def test_bytes_are_cut_where_steps_meet(start: int, num_bytes: int, wanted: list[int]) -> None:
    parts = pieces(start, num_bytes, 100)
    assert [part.stop - part.start for part in parts] == wanted
    assert [part.start for part in parts] == [sum(wanted[:index]) for index in range(len(wanted))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_lands_across_steps(arena: Arena, dtype: torch.dtype) -> None:
    landing = Landing(arena, Locks())
    kept = arena.take(STEP // 2)
    rows = torch.randn(STEP // 128, 80).to(dtype)[:, :64]  # no view of whole memory
    until(lambda: landing.land([rows]) is not None)
    landed = landing.land([rows])
    assert landed is not None
    assert torch.equal(torch.frombuffer(landed[0], dtype=dtype).view(rows.shape), rows)
    assert arena.offset(landed[0]) == len(kept)


@pytest.mark.parametrize("width", [32, 24, 3], ids=["of whole blocks", "of parts of blocks", "of odd bytes"])
@pytest.mark.parametrize("are_neighbours", [True, False])
def test_tensors_land_each_in_a_block_of_its_own(arena: Arena, width: int, are_neighbours: bool) -> None:
    landing = Landing(arena, Locks())
    parts = list(torch.randint(0, 255, (700, width), dtype=torch.uint8).split([100, 200, 50, 350]))
    if not are_neighbours:
        parts = [parts[0], parts[2], parts[1].clone(), parts[3].t()]
    until(lambda: landing.land(parts) is not None)
    kept = arena.take(64)
    landed = landing.land(parts)
    assert landed is not None
    assert [bytes(block) for block in landed] == [part.contiguous().numpy().tobytes() for part in parts]
    del landed[1:]
    assert arena.taken_bytes == 64 + -(-parts[0].nbytes // 64) * 64
    assert len(kept) == 64


def test_neighbours_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, **how: bool) -> torch.Tensor:
        copies.append(len(source))
        return copy(self, source, **how)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    first, second, third = torch.arange(96, dtype=torch.uint8).split([32, 48, 16])
    host = torch.zeros(200, dtype=torch.uint8)
    copy_bytes([first, second, third], host, [0, 32, 100])
    assert copies == [80, 16]
    assert host[:80].tolist() == list(range(80))
    assert host[100:116].tolist() == list(range(80, 96))
    assert not host[116:].any()


def test_the_last_step_ends_with_the_arena(arena: Arena) -> None:
    locks = Locks()
    landing = Landing(arena, locks)
    assert landing.take([arena.num_bytes]) is None
    until(lambda: landing.locked_bytes == arena.num_bytes)
    assert locks.pages[-1] == (arena.address + 4 * STEP, 4096)
    assert landing.take([arena.num_bytes]) is not None


def test_pages_are_unlocked_before_an_arena_s_memory_is_given_back() -> None:
    file, locks = new_shared_file("test"), Locks()
    arena = Arena(file, STEP)
    landing = Landing(arena, locks)
    while (block := landing.take([100])) is None:
        time.sleep(0.005)
    del arena, landing
    assert len(locks.pages) == 1
    del block
    assert locks.pages == []
    os.close(file)


def test_a_full_arena_has_no_block(arena: Arena) -> None:
    held = arena.take(arena.num_bytes)
    assert Landing(arena, Locks()).take([64]) is None
    assert len(held) == arena.num_bytes


def test_a_refusal_is_said_once_and_asked_for_once(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    class Refusing(Locks):
        def lock(self, address: int, num_bytes: int) -> None:
            asked.append(address)
            raise RuntimeError("operation not supported")

    landing = Landing(arena, Refusing())
    with caplog.at_level(logging.WARNING):
        assert landing.take([100]) is None
        until(lambda: "cannot be locked: operation not supported" in caplog.text)
        until(lambda: not any(thread.name == "page-lock" for thread in threading.enumerate()))
        assert landing.take([100]) is None
    assert len(asked) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_writes_embeddings_where_other_processes_read_them(
    tiny_checkpoint: Callable[[str], Path], family: str
) -> None:
    tower = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16")
    rng, side = np.random.default_rng(0), tower.settings.patch_size
    grids = [GridThw(1, 8, 4 + 4 * index) for index in range(5)]
    images = [ProcessedImage(grid, rng.integers(0, 256, (grid.num_patches, 3, side, side), np.uint8)) for grid in grids]
    runner = DeviceRunner(tower)
    wanted = [bytes(data) for data in runner.submit(images).wait().embeddings]
    file = new_shared_file("test")
    arena, view = Arena(file, 2**20), ArenaView(file)
    os.close(file)
    runner.land_in(arena)
    ends_s = time.monotonic() + 30
    while True:  # until pages are locked
        embeddings = runner.submit(images).wait().embeddings
        assert [bytes(data) for data in embeddings] == wanted
        if all(arena.holds(data) for data in embeddings):
            break
        assert time.monotonic() < ends_s
    assert [bytes(view.view(arena.offset(data), len(data))) for data in embeddings] == wanted


@pytest.mark.cuda
def test_nobody_waits_for_a_copy_across_steps(arena: Arena) -> None:
    landing = Landing(arena, CudaPages(torch.device("cuda")))
    kept = arena.take(STEP // 2)
    rows = torch.randn(STEP // 128, 64, device="cuda")
    until(lambda: landing.land([rows]) is not None)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second
    landed = landing.land([rows])
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    event.synchronize()
    assert landed is not None
    assert torch.equal(torch.frombuffer(landed[0], dtype=torch.float32).view(rows.shape), rows.cpu())
    assert len(kept) == STEP // 2


@pytest.mark.parametrize("fails", ["copy_bytes", "_to_pinned"])
def test_copies_end_before_an_error_gives_back_what_they_write(
    arena: Arena, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no more page-locked memory")

    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(module if fails == "copy_bytes" else runner_module, fails, fail)
    tower = load(tiny_checkpoint(FAMILIES[0]))
    runner = DeviceRunner(tower)
    runner._landing = Landing(arena, Locks())
    runner._landing._lock_beyond(arena.num_bytes)
    until(lambda: runner._landing.locked_bytes == arena.num_bytes)
    stream = FakeStream(arena)
    side = tower.settings.patch_size
    image = ProcessedImage(GridThw(1, 4, 4), np.zeros((16, 3, side, side), np.uint8))
    batch = runner._build_batch([image], tower.encoder)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no more page-locked memory"):
        runner._submit_to_gpu(batch, 0.0, SimpleNamespace(h2d=stream, compute=stream, d2h=stream))
    assert len(stream.taken_bytes) == 1
    assert stream.taken_bytes[0] > 0
    until(lambda: arena.taken_bytes == 0)
