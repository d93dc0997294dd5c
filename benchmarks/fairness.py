#!/usr/bin/env python3
"""Latency of small requests, alone and beside one caller's 64 large images.

    python benchmarks/fairness.py [--model DIR] [--rounds 2] [--at-most SECONDS] [-- SERVE OPTIONS …]

Twenty callers each send one 112 × 112 JPEG after another; the large images are JPEGs of 1024 × 1024, in one request
from another process. Prints both sides, interleaved, and in which stages the slowest twentieth of the small ones spent
their time. Without --model: tiny qwen2_5_vl; always on the CPU and without a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from support.arguments import ROUNDS, SECONDS
from support.server import make_tiny, running_server

from encoder_svc.bench.pictures import noise_picture
from encoder_svc.client import AsyncEncoderClient, EncoderClient

ROOT = Path(__file__).resolve().parent.parent

NUM_CALLERS = 20
NUM_LARGE = 64
ALONE_S = 5.0

Sample = tuple[float, dict[str, float]]
"""Seconds that a request took, and the server's seconds by stage."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=ROUNDS, default=2, metavar="N")
    parser.add_argument(
        "--at-most", type=SECONDS, metavar="SECONDS", help="of the large images; default: until all are encoded"
    )
    parser.add_argument("--large-caller", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("serve", nargs="*", metavar="SERVE OPTIONS")
    arguments = parser.parse_args()
    if arguments.large_caller:
        return send_large(arguments.large_caller)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_tiny(Path(folder))
        compare(model, arguments, Path(folder) / "server.log")
    return 0


def compare(model: Path, arguments: argparse.Namespace, log: Path) -> None:
    with running_server(model, ["--device", "cpu", *arguments.serve], log) as (_, target):
        for side in ("alone", "beside") * arguments.rounds:
            report(side, asyncio.run(measure(target, beside=side == "beside", at_most_s=arguments.at_most)))


def report(side: str, samples: list[Sample]) -> None:
    samples.sort(key=lambda sample: sample[0])
    latencies_ms = np.array([seconds for seconds, _ in samples]) * 1e3
    p50, p95 = np.percentile(latencies_ms, [50, 95])
    slowest = [stages for _, stages in samples[-max(len(samples) // 20, 1) :]]
    means = {stage: 1e3 * float(np.mean([stages[stage] for stages in slowest])) for stage in slowest[0]}
    spent = ", ".join(f"{stage.removesuffix('_s')} {ms:.0f}" for stage, ms in means.items() if ms >= 1)
    print(f"{side:<7} p50 {p50:6.1f} ms  p95 {p95:6.1f} ms  {len(samples)} images; slowest: {spent}", flush=True)


async def measure(target: str, *, beside: bool, at_most_s: float | None) -> list[Sample]:
    """The small requests that were sent while the large images were in work."""
    random = np.random.default_rng()
    samples: list[Sample] = []
    stop = asyncio.Event()
    picture = noise_picture(112, 112, "jpeg", seed=0)
    marks = itertools.count(int(random.integers(2**62)))

    async def call_again_and_again(client: AsyncEncoderClient) -> None:
        while not stop.is_set():
            started_s = time.perf_counter()
            (image,) = await client.encode([picture.unique(next(marks))])
            samples.append((time.perf_counter() - started_s, asdict(image.timings)))
            await asyncio.sleep(float(random.exponential(0.05)))

    async with AsyncEncoderClient(target) as client:
        callers = [asyncio.create_task(call_again_and_again(client)) for _ in range(NUM_CALLERS)]
        await asyncio.sleep(1)
        large = None
        if beside:
            command = [sys.executable, __file__, "--large-caller", target]
            large = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            assert large.stdout is not None
            await large.stdout.readline()
        samples.clear()
        try:
            async with asyncio.timeout(at_most_s):
                await (large.wait() if large else asyncio.sleep(ALONE_S))
        except TimeoutError:
            if large:
                large.kill()
                await large.wait()
        stop.set()
        await asyncio.gather(*callers)
    return samples


def send_large(target: str) -> int:
    """The other caller: says when it begins, and ends when it has its embeddings."""
    pictures = [noise_picture(1024, 1024, "jpeg", seed=seed).plain() for seed in range(NUM_LARGE)]
    with EncoderClient(target) as client:
        client.info()
        print("begins", flush=True)
        client.encode(pictures, timeout_s=600)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
