#!/usr/bin/env python3
"""How the engine batches, before a device that is pretended: no GPU, no model, the real engine and scheduler.

    python benchmarks/batching.py [--depth 3] [--pack-ms 12] [--pack-image-ms 0.8] [--elsewhere-ms 80] …

Callers send one image after the other. Each spends a while elsewhere (being sent, decoded, answered), then waits for
the engine. The device's thread packs a batch; the device runs one batch after the other, so long for each image. By
default the times are those of a Qwen3-VL server with front ends and images of 448² on an H100
(docs/performance-server.md).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
from support.arguments import CLIENTS, DEPTH, IMAGES, MILLISECONDS, ROUNDS, SECONDS

from encoder_svc.engine.device import BatchResult
from encoder_svc.engine.engine import Engine
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.images.types import GridThw, ProcessedImage
from encoder_svc.observability.device import DeviceWatch
from encoder_svc.observability.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--callers", type=CLIENTS, default=64, metavar="N")
    parser.add_argument("--depth", type=DEPTH, default=3, metavar="N", help="batches in flight")
    parser.add_argument("--max-batch-images", type=IMAGES, default=20, metavar="N")
    parser.add_argument("--pack-ms", type=MILLISECONDS, default=12.0, metavar="MS", help="for a batch")
    parser.add_argument("--pack-image-ms", type=MILLISECONDS, default=0.8, metavar="MS", help="more for each image")
    parser.add_argument("--run-ms", type=MILLISECONDS, default=1.4, metavar="MS")
    parser.add_argument("--run-image-ms", type=MILLISECONDS, default=1.6, metavar="MS")
    parser.add_argument("--back-ms", type=MILLISECONDS, default=2.0, metavar="MS", help="until a batch is told of")
    parser.add_argument("--elsewhere-ms", type=MILLISECONDS, default=80.0, metavar="MS", help="within 40 %% of it")
    parser.add_argument("--duration", type=SECONDS, default=5.0, metavar="SECONDS")
    parser.add_argument("--rounds", type=ROUNDS, default=3, metavar="N")
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        asyncio.run(measure(arguments))
    return 0


class PretendedDevice:
    """See :class:`encoder_svc.engine.runner.Runner`."""

    gaps = None

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.depth = arguments.depth
        self.back_s = arguments.back_ms / 1e3
        self.batches: list[int] = []
        self.busy_s = 0.0
        self._times = arguments
        self._free = threading.Lock()

    def submit(self, images: Sequence[ProcessedImage]) -> PretendedBatch:
        time.sleep((self._times.pack_ms + self._times.pack_image_ms * len(images)) / 1e3)
        self.batches.append(len(images))
        return PretendedBatch(self, len(images))

    def run(self, num_images: int) -> None:
        seconds = (self._times.run_ms + self._times.run_image_ms * num_images) / 1e3
        with self._free:
            time.sleep(seconds)
            self.busy_s += seconds

    def is_out_of_memory(self, error: Exception) -> bool:
        return False

    def is_broken(self) -> bool:
        return False


class PretendedBatch:
    def __init__(self, device: PretendedDevice, num_images: int) -> None:
        self._device = device
        self._num_images = num_images

    def wait_until_computed(self) -> None:
        self._device.run(self._num_images)

    def wait(self) -> BatchResult:
        time.sleep(self._device.back_s)
        return BatchResult([memoryview(b"rows")] * self._num_images, 0.0, 0.0, 0.0)


async def measure(arguments: argparse.Namespace) -> None:
    device = PretendedDevice(arguments)
    scheduler = Scheduler(max_batch_patches=arguments.max_batch_images, max_batch_images=arguments.max_batch_images)
    engine = Engine([device], scheduler, watch=DeviceWatch(Metrics()))
    image = ProcessedImage(GridThw(1, 1, 1), np.zeros((1, 1), np.uint8))
    started_s = time.monotonic()
    latencies_s: list[float] = []

    async def caller(seed: int) -> None:
        elsewhere = random.Random(seed)
        while (now_s := time.monotonic()) < started_s + arguments.duration:
            await asyncio.sleep(arguments.elsewhere_ms / 1e3 * elsewhere.uniform(0.6, 1.4))
            asked_s = time.monotonic()
            await engine.encode(image)
            latencies_s.append(time.monotonic() - max(asked_s, now_s))

    await asyncio.gather(*map(caller, range(arguments.callers)))
    elapsed_s = time.monotonic() - started_s
    await engine.aclose()
    rate, busy = len(latencies_s) / elapsed_s, device.busy_s / elapsed_s
    batch, latency_ms = statistics.mean(device.batches), statistics.mean(latencies_s) * 1e3
    print(
        f"{rate:6.1f} images/s, device busy {busy:.2f}, {batch:.1f} images a batch, {latency_ms:.0f} ms in the engine"
    )


if __name__ == "__main__":
    raise SystemExit(main())
