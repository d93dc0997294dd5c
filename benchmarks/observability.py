#!/usr/bin/env python3
"""What metrics and logs cost a server under load.

    python benchmarks/observability.py [--model DIR] [--rounds 20] [--seconds 2] [--concurrency 4]

Two servers of the same checkout run beside each other and take turns under the same closed load, each photograph
different and nothing cached: one as it is, its log in JSON in a file and its metrics scraped every five seconds; the
other with every call to prometheus-client, the loop's probe and the line for each request taken out. Without --model:
tiny qwen2_5_vl, so that a request is as cheap as can be and what is measured as dear.

Prints the throughput and the server's CPU time for an image, medians over the rounds, and the median of the rounds'
ratios with its 95 % interval (bootstrap). A machine that is shared drifts by more than what is looked for, so before
that it times the record of a call of one image by itself, with its metrics and with its line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.arguments import CLIENTS, ROUNDS, SECONDS

from encoder_svc.client import AsyncEncoderClient, EncoderClient, RequestError
from encoder_svc.observability.logs import configure_logs
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
PHOTOS: Final = [path.read_bytes() for path in sorted((ROOT / "tests" / "photos").glob("*.jpg"))]


@dataclass(frozen=True)
class Side:
    """One of the servers."""

    name: str
    target: str
    metrics_port: int
    process: psutil.Process


@dataclass(frozen=True)
class Window:
    """What a server did in one turn."""

    images_per_s: float
    cpu_ms_per_image: float


def main() -> int:
    if sys.argv[1:2] == ["--serve-without"]:
        return serve_without(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=ROUNDS, default=20, metavar="N")
    parser.add_argument("--seconds", type=SECONDS, default=2.0)
    parser.add_argument("--concurrency", type=CLIENTS, default=4, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = arguments.model or Path(folder) / "tiny"
        if arguments.model is None:
            command = ["make-checkpoint", "--family", "qwen2_5_vl", str(model)]
            subprocess.run([sys.executable, "-m", "encoder_svc", *command], check=True, stdout=subprocess.DEVNULL)
        sides = [stack.enter_context(serving(name, model, Path(folder))) for name in ("with", "without")]
        windows = asyncio.run(take_turns(sides, arguments))
        lag = loop_lag(sides[0])
    print(f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}")
    for what, seconds in (("metrics", time_a_record("warning")), ("metrics and a line of JSON", time_a_record("info"))):
        print(f"a call's record with {what}: {seconds * 1e6:.0f} us")
    print(f"{arguments.rounds} rounds of {arguments.seconds:g} s a side, {arguments.concurrency} callers")
    report(windows)
    print(f"event loop's timers that were late by at most: {lag}")
    return 0


def serve_without(options: list[str]) -> int:
    """``encoder-svc serve`` with what is measured taken out."""
    from encoder_svc import cli
    from encoder_svc.observability import metrics
    from encoder_svc.server import app

    async def no_probe(_: metrics.Metrics) -> None:
        return None

    def nothing(*_: object, **__: object) -> None:
        return None

    told = ("request_ended", "first_embedding", "image_ended", "bytes_received", "bytes_sent", "batch_ended")
    for name in told:
        setattr(metrics.Metrics, name, nothing)
    app.probe_loop_lag = no_probe
    return cli.main(["serve", *options, "--log-level", "warning"])


def time_a_record(level: str, calls: int = 2_000, batches: int = 7) -> float:
    """Seconds for the whole record of a call of one image that passed every stage; the least of some batches."""
    observer = Observer(Metrics())
    stages = Stages(**{entry.name: 0.001 for entry in fields(Stages)})
    best_s = math.inf
    with tempfile.TemporaryFile("w") as log:
        configure_logs(level, "json", log)
        for _ in range(batches):
            started_s = time.perf_counter()
            for _ in range(calls):
                with observer.request("EncodeImages", "request", ()) as record:
                    record.admitted(1, 100_000)
                    record.image_sent(0, "encoded", stages, num_rows=1_000, num_bytes=1_000_000)
            best_s = min(best_s, (time.perf_counter() - started_s) / calls)
    return best_s


@contextmanager
def serving(name: str, model: Path, folder: Path) -> Iterator[Side]:
    port, metrics_port = free_port(), free_port()
    options = ["--port", str(port), "--model", str(model), "--device", "cpu", "--cache-bytes", "0"]
    if name == "with":
        more = ["--log-format", "json", "--metrics-port", str(metrics_port)]
        command = [sys.executable, "-m", "encoder_svc", "serve", *options, *more]
    else:
        command = [sys.executable, __file__, "--serve-without", *options]
    over = threading.Event()
    with (folder / f"{name}.log").open("w") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            wait_until_ready(f"127.0.0.1:{port}")
            if name == "with":
                threading.Thread(target=scrape_repeatedly, args=(metrics_port, over), daemon=True).start()
            yield Side(name, f"127.0.0.1:{port}", metrics_port, psutil.Process(server.pid))
        finally:
            over.set()
            server.terminate()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_until_ready(target: str) -> None:
    ended_by_s = time.monotonic() + 120
    with EncoderClient(target, timeout_s=5) as client:
        while True:
            try:
                client.info()
            except RequestError:
                if time.monotonic() > ended_by_s:
                    raise
                time.sleep(0.2)
            else:
                return


def scrape_repeatedly(port: int, over: threading.Event) -> None:
    while not over.wait(5.0):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            answer.read()


def loop_lag(side: Side) -> str:
    """The share of the loop's timers within each of some bounds, idle turns included."""
    with urllib.request.urlopen(f"http://127.0.0.1:{side.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    shares = {}
    for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
        if sample.name == "encoder_event_loop_lag_seconds_bucket":
            shares[sample.labels["le"]] = sample.value
    return ", ".join(f"{float(le) * 1e3:g} ms {shares[le] / shares['+Inf']:.2%}" for le in ("0.005", "0.025", "0.1"))


async def take_turns(sides: Sequence[Side], arguments: argparse.Namespace) -> dict[str, list[Window]]:
    """Windows of each side, round by round; the sides change places from round to round."""
    numbers = itertools.count()
    windows: dict[str, list[Window]] = {side.name: [] for side in sides}
    for side in sides:
        await load(side, numbers, arguments)
    for turn in range(arguments.rounds):
        for side in sides if turn % 2 else reversed(sides):
            windows[side.name].append(await load(side, numbers, arguments))
    return windows


async def load(side: Side, numbers: Iterator[int], arguments: argparse.Namespace) -> Window:
    """A closed load for some seconds."""
    num_images = 0
    async with AsyncEncoderClient(side.target) as client:
        started_s, cpu_s = time.perf_counter(), cpu_time_s(side.process)
        ends_s = started_s + arguments.seconds

        async def caller() -> None:
            nonlocal num_images
            while time.perf_counter() < ends_s:
                number = next(numbers)
                # Bytes behind the picture's end make it another image to the server and change none of its pixels.
                await client.encode([PHOTOS[number % len(PHOTOS)] + number.to_bytes(8)])
                num_images += 1

        await asyncio.gather(*(caller() for _ in range(arguments.concurrency)))
        seconds = time.perf_counter() - started_s
        return Window(num_images / seconds, (cpu_time_s(side.process) - cpu_s) / num_images * 1e3)


def cpu_time_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def report(windows: dict[str, list[Window]]) -> None:
    for title, attribute in (("images/s", "images_per_s"), ("CPU ms an image", "cpu_ms_per_image")):
        with_, without = ([getattr(window, attribute) for window in windows[side]] for side in ("with", "without"))
        ratios = [a / b for a, b in zip(with_, without, strict=True)]
        low, high = interval(ratios)
        print(
            f"{title:<16} with {statistics.median(with_):8.2f}  without {statistics.median(without):8.2f}  "
            f"ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        )


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled rounds."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2_000))
    return medians[50], medians[-51]


if __name__ == "__main__":
    sys.exit(main())
