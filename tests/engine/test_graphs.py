from __future__ import annotations

import itertools
import time
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_svc.attention.base import PackedSequences
from encoder_svc.engine.builder import build_batch
from encoder_svc.engine.graphs import GraphInput, Graphs, bucket_sizes, max_sequences, pool_bytes
from encoder_svc.engine.runner import DeviceRunner, PreparedBatch
from encoder_svc.images.types import GridThw, ProcessedImage
from tests.models.towers import FAMILIES, Grids, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from encoder_svc.models.tower import VisionTower

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


Runners = tuple["VisionTower", DeviceRunner, DeviceRunner]
IN_GRAPHS: list[Grids] = [
    [(1, 16, 16)],
    [(1, 18, 22), (1, 4, 6)],
    [(1, 2, 2)],
    [(1, 32, 32)],
    [(1, 10, 6)] * 15,
]


def off_by(got: memoryview, wanted: memoryview) -> float:
    """‖got − wanted‖ / ‖wanted‖ of bfloat16 bytes."""
    values, exact = (torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double() for data in (got, wanted))
    return float((values - exact).norm() / exact.norm())


def random_image(grid: GridThw, side: int, seed: int = 0) -> ProcessedImage:
    patches = np.random.default_rng(seed).integers(0, 256, (grid.num_patches, 3, side, side), dtype=np.uint8)
    return ProcessedImage(grid, patches)


@given(st.integers(0, 100_000), st.sampled_from([1, 4, 9]))
@settings(deadline=None)
def test_buckets_hold_whole_merged_blocks_and_waste_little(max_patches: int, merge_unit: int) -> None:
    sizes = bucket_sizes(max_patches, merge_unit)
    assert sizes == sorted(set(sizes))
    assert all(size % merge_unit == 0 for size in sizes)
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(128, larger / 16) + merge_unit


def test_what_fills_up_a_bucket_counts_as_padding() -> None:
    assert PreparedBatch(GraphInput(size=128, num_patches=96, staged=torch.empty(0))).padding_ratio == 0.25


def test_no_patches_no_buckets() -> None:
    assert bucket_sizes(0, 4) == []


def test_a_pool_is_what_was_reserved_for_it_and_nothing_else() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1 << 30, "allocated_size": 1 << 30},  # everybody's
        {"segment_pool_id": (0, 1), "total_size": 20 << 20, "allocated_size": 0},
        {"segment_pool_id": (0, 1), "total_size": 2 << 20, "allocated_size": 512},
        {"segment_pool_id": (0, 2), "total_size": 4 << 20, "allocated_size": 512},
    ]
    assert pool_bytes(segments, (0, 1)) == 22 << 20
    assert pool_bytes(segments, (1, 0)) == 0


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.integers(0, 300))
@settings(deadline=None)
def test_padded_boundaries_begin_with_the_real_ones_and_cover_every_patch(lengths: list[int], rest: int) -> None:
    total = sum(lengths) + rest
    padded = PackedSequences.of(lengths).padded(total, 40, 64)
    assert padded is not None
    boundaries = padded.cu_seqlens.tolist()
    assert boundaries[: len(lengths) + 1] == PackedSequences.of(lengths).cu_seqlens.tolist()
    assert (len(boundaries), boundaries[-1], padded.max_seqlen) == (41, total, 64)
    assert all(0 <= after - before <= 64 for before, after in itertools.pairwise(boundaries))


@pytest.mark.parametrize(("lengths", "max_sequences"), [((8,) * 5, 4), ((65,), 10), ((1, 1), 3)])
def test_sequences_that_do_not_fit_are_not_padded(lengths: tuple[int, ...], max_sequences: int) -> None:
    assert PackedSequences.of(lengths).padded(256, max_sequences, 64) is None


@EVERY_FAMILY
@pytest.mark.parametrize("size", [128, 2_048, 4_096, 8_192, 16_384])
def test_a_bucket_holds_as_many_images_as_are_likely_to_fill_it(
    tiny_checkpoint: Callable[[str], Path], family: str, size: int
) -> None:
    encoder = load(tiny_checkpoint(family)).encoder
    number = max_sequences(size)
    assert number == min(max(size // 128, 16), 64)
    for count, fits in ((number, True), (number + 1, False)):
        inputs = encoder.build_inputs([GridThw(1, 2, 2)] * count)
        assert (inputs.padded(size, max_sequences=number) is not None) == fits


@EVERY_FAMILY
def test_padding_changes_no_row(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    """On the CPU, with the lengths put back that a graph does not need."""
    tower = load(tiny_checkpoint(family))
    grids = [GridThw(1, 12, 18), GridThw(1, 6, 4)]
    images = [random_image(grid, tower.settings.patch_size, seed) for seed, grid in enumerate(grids)]
    batch = build_batch(images, tower.encoder)
    padded = batch.inputs.padded(512, max_sequences=16)
    assert padded is not None
    inputs = with_lengths(padded)
    patches = torch.zeros((512, batch.segments[0].shape[1]), dtype=torch.uint8)
    patches[:240] = batch.segments[0]
    with torch.inference_mode():
        wanted = tower.encoder(batch.segments, batch.inputs)
        got = tower.encoder([patches], inputs)
    assert got.isfinite().all()
    torch.testing.assert_close(got[: len(wanted)], wanted, atol=1e-4, rtol=0)


def with_lengths(inputs):
    """TORCH_SDPA wants the lengths on the host, and none that is 0."""
    changed = {}
    for entry in fields(inputs):
        value = getattr(inputs, entry.name)
        if isinstance(value, PackedSequences):
            changed[entry.name] = PackedSequences.of([n for n in value.cu_seqlens.diff().tolist() if n])
    return replace(inputs, **changed)


@pytest.fixture(scope="module")
def cuda_runners(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Runners]:
    """A tower, and two runners of it: one without graphs, one with."""

    @cache
    def make(family: str) -> Runners:
        tower = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16")
        plain, warm = DeviceRunner(tower), DeviceRunner(tower)
        limit = warm.warm_up(graph_max_patches=1024, memory_fraction=0.5, max_batch_patches=32_768)
        assert limit == 32_768
        return tower, plain, warm

    return make


@pytest.mark.cuda
@pytest.mark.parametrize("grids", IN_GRAPHS, ids=str)
@EVERY_FAMILY
def test_a_graph_gives_what_is_launched_one_by_one(cuda_runners, family: str, grids: Grids) -> None:
    tower, plain, warm = cuda_runners(family)
    for seed in (1, 2):
        images = [random_image(GridThw(*grid), tower.settings.patch_size, seed) for grid in grids]
        assert warm.prepare(build_batch(images, tower.encoder)).in_graph
        results = (runner.submit(images).wait().embeddings for runner in (warm, plain))
        for got, wanted in zip(*results, strict=True):
            assert off_by(got, wanted) <= 2e-2


@pytest.mark.cuda
@EVERY_FAMILY
def test_batches_in_flight_do_not_overwrite_each_other(cuda_runners, family: str) -> None:
    tower, plain, warm = cuda_runners(family)
    batches = [[random_image(GridThw(1, 16, 16), tower.settings.patch_size, seed)] for seed in range(6)]
    submitted = [warm.submit(images) for images in batches]
    for batch, waiting in zip(batches, submitted, strict=True):
        (wanted,) = plain.submit(batch).wait().embeddings
        (got,) = waiting.wait().embeddings
        assert off_by(got, wanted) <= 2e-2


@pytest.mark.cuda
def test_batches_too_large_or_of_pixel_values_run_without(cuda_runners) -> None:
    tower, _, warm = cuda_runners("qwen2_vl")
    large = [random_image(GridThw(1, 40, 40), 14)]
    many = [random_image(GridThw(1, 2, 2), 14)] * 40
    values = [ProcessedImage(GridThw(1, 4, 4), np.zeros((16, tower.settings.patch_dim), np.float32))]
    assert not any(warm.prepare(build_batch(images, tower.encoder)).in_graph for images in (large, many, values))


@pytest.mark.cuda
def test_memory_that_others_take_meanwhile_is_not_the_graphs(cuda_runners) -> None:
    tower, _, _ = cuda_runners("qwen2_vl")
    of_others: list[torch.Tensor] = []

    def clock_beside_others() -> float:
        of_others.append(torch.empty(2**28, dtype=torch.uint8, device=tower.device))
        return time.perf_counter()

    graphs = Graphs(tower)
    with torch.inference_mode():
        graphs.capture([128], torch.cuda.Stream(), max_bytes=2**40, max_s=60, clock=clock_beside_others)
    assert graphs.buckets == (128,)
    assert 0 < graphs.num_bytes < 2**28


@pytest.mark.cuda
def test_the_measured_peak_is_never_exceeded(cuda_runners) -> None:
    tower, _, warm = cuda_runners("qwen3_vl")
    budget = warm.budget
    images = [random_image(GridThw(1, 64, 64), tower.settings.patch_size)] * 6
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    warm.submit(images).wait()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 6 * 4096 * budget.bytes_per_patch * 1.05 + budget.fixed_bytes


@pytest.mark.cuda
def test_the_steady_state_allocates_nothing(cuda_runners) -> None:
    tower, _, warm = cuda_runners("qwen2_5_vl")
    batches = [
        [random_image(GridThw(1, side, side), tower.settings.patch_size)] * number
        for side, number in ((16, 1), (40, 2), (64, 3), (26, 4))
    ]
    for images in batches:
        warm.submit(images).wait()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for images in batches * 3:
        warm.submit(images).wait()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
