"""Runs one batch on one device: h2d, forward, d2h, each timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from encoder_svc.engine.builder import build_batch
from encoder_svc.models.tower import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.images.types import ProcessedImage
    from encoder_svc.models.tower import VisionTower


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came out of a batch.

    Attributes:
        embeddings: one C-contiguous view of bytes for each image, [rows, width] of the tower's dtype.
        h2d_s, forward_s, d2h_s: of the whole batch, by the device's own clock where it has one.
    """

    embeddings: list[memoryview]
    h2d_s: float
    forward_s: float
    d2h_s: float


class DeviceRunner:
    """Owns the device. Only the engine's device thread calls it."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._dtype = TORCH_DTYPES[tower.dtype]

    def run(self, images: Sequence[ProcessedImage]) -> BatchResult:
        """Encodes ``images`` as one batch."""
        tower = self._tower
        batch = build_batch(images, tower.encoder)
        stopwatch = _CudaStopwatch(tower.device) if tower.device.type == "cuda" else _HostStopwatch()
        with torch.inference_mode():
            stopwatch.mark()
            on_device = batch.to(tower.device)
            stopwatch.mark()
            pixel_values = on_device.pixel_values(tower.settings, self._dtype)
            rows_on_device = tower.encoder(pixel_values, on_device.inputs)
            stopwatch.mark()
            rows = rows_on_device.cpu()
            stopwatch.mark()
        counts = [grid.num_rows(tower.settings.merge_size) for grid in batch.grids]
        embeddings = [_bytes_of(part) for part in rows.split(counts)]
        return BatchResult(embeddings, *stopwatch.intervals_s())


def _bytes_of(rows: torch.Tensor) -> memoryview:
    """The tensor's own memory, as bytes."""
    return rows.contiguous().view(torch.uint8).numpy().data.cast("B")


class _HostStopwatch:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        return [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]


class _CudaStopwatch:
    """Marks on the device's own time line."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def intervals_s(self) -> list[float]:
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(self._marks, self._marks[1:], strict=False)]
