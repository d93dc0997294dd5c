from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from encoder_svc.engine import memory
from encoder_svc.engine.memory import MemoryBudget, budget_from, measure
from encoder_svc.engine.runner import DeviceRunner
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

GIB = 2**30


def test_two_measurements_make_a_line() -> None:
    budget = budget_from(
        (1_000, 5_000_000), (3_000, 13_000_000), free_bytes=GIB, fraction=1.0, in_flight=1, io_bytes=100.0
    )
    assert (budget.bytes_per_patch, budget.fixed_bytes) == (4_000, 1_000_000)
    assert budget.max_patches == (GIB - 1_000_000) // 4_000


def test_inputs_and_outputs_of_every_batch_in_flight_count() -> None:
    budget = budget_from((1_000, 4_000), (2_000, 8_000), free_bytes=GIB, fraction=1.0, in_flight=3, io_bytes=100.0)
    assert budget.bytes_per_patch == 4 + 2 * 100


def test_pixels_of_every_batch_in_flight_and_one_resize_count() -> None:
    budget = budget_from(
        (1_000, 5_000),
        (2_000, 9_000),
        free_bytes=GIB,
        fraction=1.0,
        in_flight=2,
        io_bytes=100.0,
        pixel_bytes=50,
        resize_bytes=7_000,
    )
    assert (budget.bytes_per_patch, budget.fixed_bytes) == (4 + 100 + 2 * 50, 1_000 + 7_000)


def test_only_the_fraction_is_taken() -> None:
    whole, half = (
        MemoryBudget(bytes_per_patch=1024, fixed_bytes=0, free_bytes=GIB, fraction=fraction) for fraction in (1.0, 0.5)
    )
    assert (whole.max_patches, half.max_patches) == (2**20, 2**19)


def test_a_full_device_still_takes_one_image_at_a_time() -> None:
    assert MemoryBudget(bytes_per_patch=1024, fixed_bytes=10**6, free_bytes=10**5, fraction=0.9).max_patches == 1


def test_what_the_allocator_keeps_counts_as_free_only_if_it_gives_it_back(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs keep 2 GiB in which nothing lies while none runs, forwards left 3; 1 was never taken."""
    kept = {"graphs": 2 * GIB, "forwards": 3 * GIB}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.update(forwards=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * GIB - sum(kept.values()), 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: sum(kept.values()))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(memory, "_peak", lambda _, patches: (patches, 1000 * patches))
    assert measure(load(tiny_checkpoint("qwen2_vl")), fraction=0.9, in_flight=2).free_bytes == 4 * GIB


def test_on_a_cpu_it_does_not_apply(tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    runner = DeviceRunner(load(tiny_checkpoint("qwen2_vl")))
    with caplog.at_level(logging.INFO):
        limit = runner.warm_up(graph_max_patches=4096, memory_fraction=0.9, max_batch_patches=1234)
    assert (limit, runner.budget) == (1234, None)
    assert "does not apply on a CPU" in caplog.text
