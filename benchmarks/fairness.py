#!/usr/bin/env python3
"""Latency of small requests, alone and beside one request of 64 large images.

    python benchmarks/fairness.py [--max-batch-patches N …]

Twenty callers each send one 112 × 112 image after another; the large images are 800 × 800. Prints, for each batch
budget, both sides twice, interleaved. Tiny qwen2_5_vl on the CPU, no cache.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from encoder_svc.client import AsyncEncoderClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

NUM_CALLERS = 20
ALONE_S = 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-batch-patches", type=int, nargs="+", default=[4096, 65536], metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        command = ["make-checkpoint", "--family", "qwen2_5_vl", str(model)]
        subprocess.run([sys.executable, "-m", "encoder_svc", *command], check=True, stdout=subprocess.DEVNULL)
        for budget in arguments.max_batch_patches:
            compare(model, budget, Path(folder) / "server.log")
    return 0


def compare(model: Path, budget: int, log: Path) -> None:
    from demo import wait_for_port

    command = [sys.executable, "-m", "encoder_svc", "serve", "--model", str(model), "--port", "0", "--device", "cpu"]
    command += ["--cache-bytes", "0", "--max-batch-patches", str(budget)]
    with log.open("w") as output, subprocess.Popen(command, stderr=output) as server:
        try:
            target = f"127.0.0.1:{wait_for_port(server, log)}"
            for side in ("alone", "beside", "alone", "beside"):
                latencies_ms = np.array(asyncio.run(measure(target, beside=side == "beside"))) * 1e3
                p50, p95 = np.percentile(latencies_ms, [50, 95])
                print(
                    f"{budget:>7} {side:<7} p50 {p50:6.1f} ms  p95 {p95:6.1f} ms  {len(latencies_ms)} images",
                    flush=True,
                )
        finally:
            server.terminate()


async def measure(target: str, *, beside: bool) -> list[float]:
    """Seconds of each small request."""
    random = np.random.default_rng(0)
    latencies_s: list[float] = []
    stop = asyncio.Event()

    def noise(side: int) -> np.ndarray:
        return random.integers(0, 256, (side, side, 3), np.uint8)

    async def call_again_and_again(client: AsyncEncoderClient) -> None:
        while not stop.is_set():
            image = noise(112)
            started_s = time.perf_counter()
            await client.encode([image])
            latencies_s.append(time.perf_counter() - started_s)
            await asyncio.sleep(0.05)

    async with AsyncEncoderClient(target) as small, AsyncEncoderClient(target) as large:
        callers = [asyncio.create_task(call_again_and_again(small)) for _ in range(NUM_CALLERS)]
        await asyncio.sleep(1)
        images = [noise(800) for _ in range(64)]
        latencies_s.clear()
        await (large.encode(images) if beside else asyncio.sleep(ALONE_S))
        stop.set()
        await asyncio.gather(*callers)
    return latencies_s


if __name__ == "__main__":
    raise SystemExit(main())
