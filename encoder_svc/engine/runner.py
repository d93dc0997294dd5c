"""Runs batches on one device: h2d, resize, forward, d2h, each timed by the device's own clock.

On a GPU the three have streams of their own, and a batch is submitted while those before it still run: its h2d overlaps
their forwards, and its forward the d2h of the one before. On a CPU submitting a batch runs it.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch

from encoder_svc.attention.triton_windows import MAX_WINDOW_PATCHES
from encoder_svc.engine.device import BatchResult
from encoder_svc.engine.gaps import LayerGaps
from encoder_svc.engine.graphs import GraphInput, Graphs, bucket_sizes
from encoder_svc.engine.landing import CudaPages, Landing, copy_bytes
from encoder_svc.engine.memory import measure, rehearse
from encoder_svc.engine.outputs import bytes_of, finite_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from encoder_svc.engine.builder import Batch
    from encoder_svc.engine.device import Submitted
    from encoder_svc.engine.memory import MemoryBudget
    from encoder_svc.images.types import EncoderImage, GridThw
    from encoder_svc.models.tower import VisionTower
    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

MAX_GRAPH_BYTES: Final = 4 * 2**30
MAX_CAPTURE_S: Final = 15.0
"""Bounds on the graphs that a start captures, in device memory and in time."""


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch on the device: as it was built, or staged for a graph."""

    value: Batch | GraphInput

    @property
    def in_graph(self) -> bool:
        return isinstance(self.value, GraphInput)

    @property
    def padding_ratio(self) -> float:
        """The share of its patches that fill up the graph's bucket."""
        return 1 - self.value.num_patches / self.value.size if isinstance(self.value, GraphInput) else 0.0


class DeviceRunner:
    """Runs a tower's batches on its device.

    Attributes:
        budget: how many patches fit the device's memory, once :meth:`warm_up` measured it; None on a CPU.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.budget: MemoryBudget | None = None
        self._graphs: Graphs | None = None
        self._tower = tower
        self._build_batch = tower.workflow.load_input_builder()
        self._output_processor = tower.workflow.load_output_processor()
        self._landing: Landing | None = None
        self._lanes = _Lanes(tower.device) if tower.device.type == "cuda" else None
        self.depth = 1 if self._lanes is None else 3
        self.gaps = LayerGaps(tower.encoder) if self._lanes is None else None

    @torch.inference_mode()
    def warm_up(
        self,
        *,
        graph_max_patches: int,
        memory_fraction: float,
        max_batch_patches: int,
        phase_ended: Callable[[str], None] = lambda phase: None,
    ) -> int:
        """Captures graphs, measures what a forward takes, and runs the largest batch once, so that its memory is had.

        Args:
            graph_max_patches: of a batch that runs as a CUDA graph; 0 for no graphs.
            memory_fraction: of the device's free memory that batches may take.
            max_batch_patches: the operator's bound.
            phase_ended: is told of ``"graphs"`` and ``"memory"`` once they are done.

        Returns:
            The largest batch, in patches: the operator's bound or what fits.
        """
        if self._lanes is None:
            logger.info("memory budget: does not apply on a CPU; batches hold %d patches at most", max_batch_patches)
            return max_batch_patches
        tower = self._tower
        with torch.cuda.device(tower.device):
            if graph_max_patches:
                self._capture(graph_max_patches, self._lanes.compute)
                phase_ended("graphs")
            with torch.cuda.stream(self._lanes.compute):
                self.budget = measure(tower, fraction=memory_fraction, in_flight=self.depth)
                limit = min(self.budget.max_patches, max_batch_patches)
                rehearse(tower, limit)
            phase_ended("memory")
        logger.info(
            "memory budget: %.1f KiB a patch at the peak and %d MiB beside, %.1f GiB free, %.0f %% of it for batches: "
            "%d patches fit; batches hold %d at most",
            self.budget.bytes_per_patch / 2**10,
            self.budget.fixed_bytes >> 20,
            self.budget.free_bytes / 2**30,
            memory_fraction * 100,
            self.budget.max_patches,
            limit,
        )
        return limit

    def _capture(self, max_patches: int, stream: torch.cuda.Stream) -> None:
        backend, config = self._tower.encoder.attention.backend, self._tower.encoder.config
        if not backend.capturable:
            logger.info("graphs: none; %s shapes its work by lengths on the host", backend.name)
            return
        if (config.window_patches or 0) > MAX_WINDOW_PATCHES:
            logger.info("graphs: none; windows hold more than %d patches", MAX_WINDOW_PATCHES)
            return
        merge_unit = config.spatial_merge_size**2
        graphs = Graphs(self._tower)
        graphs.capture(bucket_sizes(max_patches, merge_unit), stream, max_bytes=MAX_GRAPH_BYTES, max_s=MAX_CAPTURE_S)
        self._graphs = graphs

    def land_in(self, arena: Arena) -> None:
        """Has a GPU write embeddings into this arena by itself, as far as there is room that is page-locked."""
        if self._lanes is not None:
            self._landing = Landing(arena, CudaPages(self._tower.device))

    def submit(self, images: Sequence[EncoderImage]) -> Submitted:
        """See :class:`encoder_svc.engine.device.Runner`; so with the next two."""
        started_s = time.perf_counter()
        batch = self._build_batch(images, self._tower.encoder)
        build_s = time.perf_counter() - started_s
        with torch.inference_mode():
            if self._lanes is None:
                return self._run_on_host(batch, build_s)
            return self._submit_to_gpu(batch, build_s, self._lanes)

    def is_out_of_memory(self, error: Exception) -> bool:
        if error.__cause__ is not None:  # an attention kernel's failure, whose cause is what the device raised
            return isinstance(error.__cause__, Exception) and self.is_out_of_memory(error.__cause__)
        # torch's CPU allocator raises a plain RuntimeError that names it.
        return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)

    def is_broken(self) -> bool:
        """A CUDA context that met an illegal address or a failed assertion stays so for good."""
        if self._lanes is None:
            return False
        try:
            torch.cuda.synchronize(self._tower.device)
        except RuntimeError:
            return True
        return False

    def prepare(self, batch: Batch) -> PreparedBatch:
        """A batch on the device, ready for :meth:`rows`. On a GPU without waiting for it to get there."""
        staged = None if self._graphs is None else self._graphs.stage(batch)
        return PreparedBatch(batch.to(self._tower.device) if staged is None else staged)

    def resize(self, prepared: PreparedBatch) -> PreparedBatch:
        """The same batch, all of it patches. On a GPU, of the current stream."""
        if isinstance(prepared.value, GraphInput):
            assert self._graphs is not None
            self._graphs.resize(prepared.value)
            return prepared
        return PreparedBatch(prepared.value.resized())

    def rows(self, prepared: PreparedBatch) -> torch.Tensor:
        """The forward alone, of a batch that :meth:`resize` returned: embedding rows [rows, width] on the device. On a
        GPU, of the current stream."""
        if isinstance(prepared.value, GraphInput):
            assert self._graphs is not None
            return self._graphs.run(prepared.value)
        rows: torch.Tensor = self._tower.encoder(prepared.value.patches(), prepared.value.inputs)
        return rows

    def _forward(self, prepared: PreparedBatch, grids: list[GridThw]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What is sent of each image, [rows, width], and which of the encoder's rows are finite [rows of all images].
        On a GPU, of the current stream."""
        rows = self.rows(prepared)
        parts = self._output_processor(rows, grids, self._tower.settings.merge_size)
        return parts, rows.isfinite().all(dim=-1)

    def _run_on_host(self, batch: Batch, build_s: float) -> Submitted:
        assert self.gaps is not None
        started_s = time.perf_counter()
        resized = self.resize(self.prepare(batch))
        resized_s, taken_s = time.perf_counter(), self.gaps.taken_s
        parts, finite = self._forward(resized, batch.grids)
        forward_s = time.perf_counter() - resized_s - (self.gaps.taken_s - taken_s)
        device_s = _DeviceTimes(resize_s=resized_s - started_s, forward_s=forward_s)
        return _Finished(self._result(batch, [*map(bytes_of, parts)], finite, device_s, build_s))

    def _submit_to_gpu(self, batch: Batch, build_s: float, lanes: _Lanes) -> Submitted:
        # Two are waited for, without a core that turns on the spot.
        marks = [torch.cuda.Event(enable_timing=True, blocking=number in (4, 6)) for number in range(7)]
        with torch.cuda.stream(lanes.h2d):
            marks[0].record()
            on_device = self.prepare(batch)
            marks[1].record()
        with torch.cuda.stream(lanes.compute):
            lanes.compute.wait_event(marks[1])
            marks[2].record()
            resized = self.resize(on_device)
            marks[3].record()
            parts, finite = self._forward(resized, batch.grids)
            marks[4].record()
        with torch.cuda.stream(lanes.d2h), _waited_for_on_error(lanes.d2h):
            lanes.d2h.wait_event(marks[4])
            marks[5].record()
            outputs = self._to_host(parts)
            finite_on_host = _to_pinned(finite)
            marks[6].record()
        # The tensors on the device are kept until the batch is through, so that no stream finds their memory reused.
        kept = (on_device, parts, finite)
        return _InFlight(self, batch, build_s, on_device.padding_ratio, kept, outputs, finite_on_host, marks)

    def _to_host(self, parts: list[torch.Tensor]) -> list[memoryview]:
        """A copy of each image's rows in page-locked memory, on its way when this returns."""
        landed = None if self._landing is None else self._landing.land(parts)
        if landed is not None:
            return [block.toreadonly() for block in landed]
        ends = [*accumulate(part.nbytes for part in parts)]
        host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        starts = [0, *ends[:-1]]
        copy_bytes(parts, host, starts)
        data = host.numpy().data.toreadonly()
        return [data[start:end] for start, end in zip(starts, ends, strict=True)]

    def _result(
        self,
        batch: Batch,
        embeddings: Sequence[memoryview],
        finite: torch.Tensor,
        device_s: _DeviceTimes,
        build_s: float,
    ) -> BatchResult:
        started_s = time.perf_counter()
        num_rows = [grid.num_rows(self._tower.settings.merge_size) for grid in batch.grids]
        only = finite_only(embeddings, finite, num_rows)
        return BatchResult(only, **asdict(device_s), build_s=build_s, split_s=time.perf_counter() - started_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeviceTimes:
    h2d_s: float = 0.0
    resize_s: float
    forward_s: float
    d2h_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Finished:
    result: BatchResult

    def wait_until_computed(self) -> None:
        return

    def wait(self) -> BatchResult:
        return self.result


@dataclass(frozen=True, slots=True)
class _InFlight:
    runner: DeviceRunner
    batch: Batch
    build_s: float
    padding_ratio: float
    kept: tuple[object, ...]
    outputs: list[memoryview]
    finite: torch.Tensor
    marks: list[torch.cuda.Event]

    def wait_until_computed(self) -> None:
        self.marks[4].synchronize()

    def wait(self) -> BatchResult:
        self.marks[-1].synchronize()
        h2d_s, resize_s, forward_s, d2h_s = (self.marks[i].elapsed_time(self.marks[i + 1]) / 1e3 for i in (0, 2, 3, 5))
        device_s = _DeviceTimes(h2d_s=h2d_s, resize_s=resize_s, forward_s=forward_s, d2h_s=d2h_s)
        result = self.runner._result(self.batch, self.outputs, self.finite, device_s, self.build_s)
        return replace(result, padding_ratio=self.padding_ratio)


class _Lanes:
    """The device's streams."""

    def __init__(self, device: torch.device) -> None:
        self.h2d, self.compute, self.d2h = (torch.cuda.Stream(device) for _ in range(3))


@contextmanager
def _waited_for_on_error(stream: torch.cuda.Stream) -> Iterator[None]:
    """An error gives back the memory that copies are on their way to, and the next batch takes it: they end before."""
    try:
        yield
    except BaseException:
        stream.synchronize()
        raise


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked host memory, on its way when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
