"""CUDA graphs: a batch's kernels launched by one call. Python takes as long to launch them as a GPU does to run them,
and longer where other threads want its lock.

One graph for each bucket of patches. A batch is padded up to its bucket: patches beyond its own form sequences of their
own, so that nothing real attends to them. Larger batches, and those of more sequences than a graph holds, run without.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from encoder_svc.attention.base import PackedSequences
from encoder_svc.engine.builder import Scattered
from encoder_svc.engine.pixels import Pixels
from encoder_svc.images.types import GridThw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from encoder_svc.engine.builder import Batch
    from encoder_svc.models.base import EncoderInputs, VisionEncoder
    from encoder_svc.models.tower import VisionTower

logger = logging.getLogger(__name__)

# A matrix product works on 128 rows at a time: up to there padding costs next to nothing. Beyond so many steps they are
# twice as long, and so on: at most a sixteenth is padding.
_STEP_PATCHES: Final = 128
_STEPS_OF_A_LENGTH: Final = 32
_MIN_SEQUENCES: Final = 16
_MAX_SEQUENCES: Final = 64
# A bucket that is this many times too large costs more than it saves.
_MAX_WASTE: Final = 2
_ALIGNED_BYTES: Final = 256


def bucket_sizes(max_patches: int, merge_unit: int) -> list[int]:
    """Buckets up to about ``max_patches``, smallest first, of whole merged blocks."""
    sizes, size, step = [], 0, _STEP_PATCHES
    while (size := size + step) <= max_patches:
        sizes.append(size + -size % merge_unit)
        if size == step * _STEPS_OF_A_LENGTH:
            step *= 2
    return sizes


def max_sequences(size: int) -> int:
    """How many images, or frames, a bucket's graph holds. A kernel looks at each of them, also at those that are not
    there: that is nothing beside a large bucket's work, and not beside a small one's."""
    return min(max(size // _STEP_PATCHES, _MIN_SEQUENCES), _MAX_SEQUENCES)


def pool_bytes(segments: Iterable[Mapping[str, Any]], pool: tuple[int, int]) -> int:
    """What torch's allocator has reserved for one pool.

    Args:
        segments: of ``torch.cuda.memory_snapshot()``.
    """
    return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] == pool)


@dataclass(frozen=True, slots=True)
class GraphInput:
    """A batch for a graph, its patches and inputs as one run of bytes on the device.

    Attributes:
        size: the bucket.
        num_patches: of the batch itself.
        pixels: what is to be resized, by the row of ``staged`` at which its patches begin.
    """

    size: int
    num_patches: int
    staged: torch.Tensor
    pixels: dict[int, Pixels] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Graph:
    """``slots`` are the places in ``buffer`` of the patches and of each tensor of the inputs, in that order."""

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    slots: list[slice]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A bucket's places on the device; ``patches`` and ``inputs`` are views of ``buffer``."""

    buffer: torch.Tensor
    slots: list[slice]
    patches: torch.Tensor
    inputs: EncoderInputs


class Graphs:
    """The graphs of one tower. They share memory, inputs and results too, so only one runs at a time, on one stream.

    Attributes:
        num_bytes: device memory that they hold, by torch's own count, whatever else uses the device. What the driver
            keeps for each graph is not in it: only the device's free memory shows that, and what others take with it.
    """

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._encoder: VisionEncoder = tower.encoder
        self._graphs: dict[int, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._buffer: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self.num_bytes = 0

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(sorted(self._graphs))

    def capture(
        self,
        sizes: list[int],
        stream: torch.cuda.Stream,
        *,
        max_bytes: int,
        max_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Captures the largest bucket first, whose memory the others then share, until a bound is reached.

        Args:
            max_s: of capturing. What a bucket's kernels take to be compiled is not counted: it is less at the next
                start, which shall not have other graphs.
        """
        captured_s = first_run_s = 0.0
        for size in sorted(sizes, reverse=True):
            if captured_s > max_s or self.num_bytes > max_bytes:
                logger.warning("graphs: stopped at a bound before the bucket of %d patches", size)
                break
            began_s = clock()
            prepared = self._prepare(size)
            self._run_once(prepared, stream)
            ready_s = clock()
            self._graphs[size] = self._capture(prepared, stream)
            first_run_s += ready_s - began_s
            captured_s += clock() - ready_s
            self.num_bytes = self._count_bytes()
        logger.info(
            "graphs: %d buckets up to %d patches, captured in %.1f s after first runs of %.1f s, %d MiB reserved",
            len(self._graphs),
            max(self._graphs, default=0),
            captured_s,
            first_run_s,
            self.num_bytes >> 20,
        )

    def _count_bytes(self) -> int:
        assert self._buffer is not None
        assert self._rows is not None
        pool = pool_bytes(torch.cuda.memory_snapshot(), self._pool)
        return pool + self._buffer.nbytes + self._rows.nbytes

    def _prepare(self, size: int) -> _Prepared:
        config, device = self._encoder.config, self._tower.device
        merge = config.spatial_merge_size
        inputs = self._encoder.build_inputs([GridThw(1, merge, size // merge)])
        padded = inputs.padded(size, max_sequences=max_sequences(size))
        assert padded is not None, "one image fits its own bucket"
        patches = torch.zeros((size, config.in_channels * config.patch_size**2), dtype=torch.uint8)
        tensors = [patches, *_tensors(padded)]
        slots = _slots(tensors)
        if self._buffer is None:  # the largest comes first
            self._buffer = torch.empty(slots[-1].stop, dtype=torch.uint8, device=device)
        buffer = self._buffer[: slots[-1].stop]
        views = [buffer[at].view(value.dtype).view(value.shape) for at, value in zip(slots, tensors, strict=True)]
        for view, value in zip(views, tensors, strict=True):
            view.copy_(value)
        return _Prepared(buffer, slots, views[0], _with_tensors(padded, views[1:]))

    def _run_once(self, prepared: _Prepared, stream: torch.cuda.Stream) -> None:
        """So that what is compiled or loaded at first use is so before the capture."""
        stream.wait_stream(torch.cuda.current_stream(self._tower.device))
        with torch.cuda.stream(stream):
            rows = self._encoder([prepared.patches], prepared.inputs)
            if self._rows is None:
                self._rows = torch.empty_like(rows)
            stream.synchronize()

    def _capture(self, prepared: _Prepared, stream: torch.cuda.Stream) -> _Graph:
        assert self._rows is not None
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            rows = self._encoder([prepared.patches], prepared.inputs)
            self._rows[: len(rows)].copy_(rows)
        return _Graph(graph, prepared.buffer, prepared.slots)

    def stage(self, batch: Batch) -> GraphInput | None:
        """Pads a batch on the host to its bucket and sends it; None where it runs without a graph."""
        if not batch.is_uint8:
            return None
        num_patches = sum(map(len, batch.segments))
        size = next((bucket for bucket in self.buckets if bucket >= num_patches), None)
        if size is None or size > max(_MAX_WASTE * num_patches, _STEP_PATCHES):
            return None
        inputs = batch.inputs.padded(size, max_sequences=max_sequences(size))
        if inputs is None:
            return None
        graph = self._graphs[size]
        packed = torch.empty(len(graph.buffer), dtype=torch.uint8, pin_memory=True)
        plain = packed.numpy()  # with torch's own operations Python's lock would change hands at each of them
        for at, value in zip(graph.slots[1:], _tensors(inputs), strict=True):
            plain[at] = value.numpy().reshape(-1).view(np.uint8)
        patches_NK = packed[graph.slots[0]].view(size, -1)  # beyond the batch's patches whatever was there
        row, pixels = 0, {}
        for segment in batch.segments:
            if isinstance(segment, Pixels):
                pixels[row] = segment.to(self._tower.device)
            elif isinstance(segment, Scattered):
                segment.copy_to(patches_NK[row : row + len(segment)])
            else:
                patches_NK[row : row + len(segment)] = segment
            row += len(segment)
        return GraphInput(size, num_patches, packed.to(self._tower.device, non_blocking=True), pixels)

    def resize(self, batch: GraphInput) -> None:
        """Fills in the patches of what came as pixels. On the current stream."""
        patches_NK = batch.staged[self._graphs[batch.size].slots[0]].view(batch.size, -1)
        for row, pixels in batch.pixels.items():
            pixels.cut_into(patches_NK[row : row + len(pixels)])

    def run(self, batch: GraphInput) -> torch.Tensor:
        """Its rows, in memory of their own. On the stream that captured, after :meth:`resize`."""
        graph = self._graphs[batch.size]
        graph.buffer.copy_(batch.staged)
        graph.graph.replay()
        assert self._rows is not None
        return self._rows[: batch.num_patches // self._encoder.config.spatial_merge_size**2].clone()


def _tensors(inputs: EncoderInputs) -> list[torch.Tensor]:
    values = [getattr(inputs, entry.name) for entry in fields(inputs)]
    return [value.cu_seqlens if isinstance(value, PackedSequences) else value for value in values]


def _with_tensors(inputs: EncoderInputs, tensors: list[torch.Tensor]) -> EncoderInputs:
    changed: dict[str, Any] = {}
    for entry, tensor in zip(fields(inputs), tensors, strict=True):
        value = getattr(inputs, entry.name)
        changed[entry.name] = value._replace(cu_seqlens=tensor) if isinstance(value, PackedSequences) else tensor
    return replace(inputs, **changed)


def _slots(tensors: list[torch.Tensor]) -> list[slice]:
    """A place for each, aligned as kernels like it."""
    slots: list[slice] = []
    start = 0
    for tensor in tensors:
        slots.append(slice(start, start + tensor.nbytes))
        start += tensor.nbytes + -tensor.nbytes % _ALIGNED_BYTES
    return slots
