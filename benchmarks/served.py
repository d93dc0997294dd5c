#!/usr/bin/env python3
"""What a server makes of its encoder: served images/s against the same encoder called in a loop.

    python benchmarks/served.py [--family NAME] [--dimensions tiny|real] [--sides 448] [--clients 32] [--servers 1]
                                [-- OPTIONS …]

The loop has its images decoded, resized and cut into patches, and calls the encoder with batches of as many images as
the server's largest batch holds. The server, started with OPTIONS, gets JPEGs (or, with ``--format raw``, pixels) and
streams embeddings to clients on the same machine. Both sides in turn, each in a process of its own; no cache. With
``--servers N`` the clients are spread over N servers that share the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from support.arguments import CLIENTS, IMAGES, PROCESSES, ROUNDS, SECONDS, SIDE
from support.server import cpu_s, metrics_url, running_server
from support.watch import Watch

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parent.parent

LARGEST_BATCH_PATCHES = {"cpu": 4_096, "cuda": 16_384}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="qwen2_5_vl")
    parser.add_argument("--dimensions", default="tiny", choices=["tiny", "real"])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, in place of one made here")
    parser.add_argument("--sides", type=SIDE, nargs="+", default=[448], metavar="PIXELS", help="of one start in turn")
    parser.add_argument("--format", default="jpeg", choices=["jpeg", "raw"])
    parser.add_argument("--clients", type=CLIENTS, default=32, metavar="N")
    parser.add_argument("--servers", type=PROCESSES, default=1, metavar="N")
    parser.add_argument("--client-processes", type=PROCESSES, default=1, metavar="N")
    parser.add_argument("--connections", type=CLIENTS, default=1, metavar="N", help="of each client process")
    parser.add_argument("--rounds", type=ROUNDS, default=3, metavar="N")
    parser.add_argument("--duration", type=SECONDS, default=10.0, metavar="SECONDS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-images", type=IMAGES, metavar="N", help="of the loop; default: --clients")
    parser.add_argument("--loop", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--loop-side", type=SIDE, help=argparse.SUPPRESS)
    parser.add_argument("serve", nargs="*", metavar="SERVE OPTIONS")
    arguments = parser.parse_args()
    if arguments.loop:
        print(json.dumps(loop(arguments)), flush=True)
        return 0
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))
    return 0


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    model = arguments.model or folder / "model"
    if arguments.model is None:
        make_model(model, arguments)
    ratios: dict[int, list[float]] = {side: [] for side in arguments.sides}
    options = ["--device", arguments.device, "--dtype", arguments.dtype, "--metrics-port", "0", *arguments.serve]
    logs = [folder / f"server-{index}.log" for index in range(arguments.servers)]
    with ExitStack() as running:
        servers = [running.enter_context(running_server(model, options, log)) for log in logs]
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                ratios[side].append(one_round(model, side, servers, logs, arguments, folder))
    name = arguments.model.name if arguments.model else f"{arguments.family} {arguments.dimensions}"
    for side, seen in ratios.items():
        print(f"{name}, {side}² {arguments.format}, {arguments.clients} clients, {arguments.servers} servers")
        print(f"served ÷ loop, median of {len(seen)}: {statistics.median(seen):.2f}")


def one_round(
    model: Path,
    side: int,
    servers: list[tuple[psutil.Process, str]],
    logs: list[Path],
    arguments: argparse.Namespace,
    folder: Path,
) -> float:
    """Both sides once; served ÷ loop."""
    mix = folder / "mix.json"
    mix.write_text(json.dumps([{"size": [side] * 2, "format": arguments.format}]))
    alone = in_a_process(model, side, arguments)
    with ExitStack() as watching:
        watches = [watching.enter_context(Watch(metrics_url(log))) for log in logs]
        served = load(servers, mix, arguments, folder)
    ratio: float = served["patches_per_s"] / alone["patches_per_s"]
    print(f"loop    {side}²  {describe(alone)}")
    print(f"served  {side}²  {describe(served)}  ratio {ratio:.2f}", flush=True)
    watched = watches[0].summary()
    if watched:
        of = " of one server" if arguments.servers > 1 else ""
        print(f"  device busy{of} {watched['device_busy']:.3f}; threads busy{of}: {table(watched['cores'])}")
        print(f"  milliseconds of an image, by stage: {table(watched['stages_ms'])}", flush=True)
    return ratio


def table(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    command = ["make-checkpoint", "--family", arguments.family, "--size", arguments.dimensions, "--vision-only"]
    subprocess.run([sys.executable, "-m", "encoder_svc", *command, str(folder)], check=True, stdout=subprocess.DEVNULL)


def describe(side: dict[str, Any]) -> str:
    text = f"{side['images_per_s']:8.2f} images/s {side['patches_per_s']:10,.0f} patches/s"
    if "p50" in side:
        text += f"  p50 {side['p50']:.1f} p99 {side['p99']:.1f} ms  {side['megabytes_per_s']:.0f} MB/s out"
        text += f"  server {side['server_cores']:.1f} cores, {side['server_cores'] / side['images_per_s'] * 1e3:.1f} ms"
        text += " of CPU an image"
        text += f", client {side['client_cores']:.1f}"
    else:
        text += f"  {side['cores']:.1f} cores, {side['cores'] / side['images_per_s'] * 1e3:.1f} ms of CPU an image"
    return text


def in_a_process(model: Path, side: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--loop", str(model), "--loop-side", str(side)]
    for name in ("clients", "duration", "device", "dtype", "batch_images"):
        value = getattr(arguments, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ  # as `encoder-svc serve` has it
    done = subprocess.run(
        [*command, "--", *arguments.serve], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def loop(arguments: argparse.Namespace) -> dict[str, Any]:
    """The encoder alone, loaded exactly as the server loads it."""
    from encoder_svc.allocator import use_one_heap
    from encoder_svc.bench.pictures import noise_picture
    from encoder_svc.config import load_config
    from encoder_svc.engine.runner import DeviceRunner
    from encoder_svc.images.limits import Limits
    from encoder_svc.images.types import EncodedImageBytes
    from encoder_svc.observability.metrics import Metrics
    from encoder_svc.observability.start import StartPhases
    from encoder_svc.server.loading import Loader

    use_one_heap()
    flags = {"device": arguments.device, "dtype": arguments.dtype, **serve_flags(arguments.serve)}
    config = load_config(flags=flags, environment={}).config
    loader = Loader(config, str(arguments.loop), Metrics(), StartPhases(0.0))
    tower = loader.load_tower()
    processor = tower.workflow.load_input_processor()(tower.settings, Limits())
    number, side = arguments.batch_images or arguments.clients, arguments.loop_side
    pictures = [noise_picture(side, side, "jpeg", seed=seed).plain() for seed in range(number)]
    images = [processor.plan(EncodedImageBytes(picture)).process() for picture in pictures]
    largest = LARGEST_BATCH_PATCHES["cpu" if arguments.device == "cpu" else "cuda"]
    per_batch = max(min(largest // images[0].grid.num_patches, number), 1)
    runner = DeviceRunner(tower)
    runner.warm_up(  # graphs, where the server has them
        graph_max_patches=config.cuda_graph_max_patches,
        memory_fraction=config.memory_fraction,
        max_batch_patches=largest,
    )
    batch = tower.workflow.load_input_builder()(images[:per_batch], tower.encoder)

    def wait() -> None:
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()

    def call() -> None:
        runner.rows(runner.resize(runner.prepare(batch)))

    with torch.inference_mode():
        call()
        wait()
        done, started_s, used_s = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started_s < arguments.duration:
            call()
            done += 1
            if done % 4 == 0:
                wait()
        wait()
        elapsed_s, used_s = time.perf_counter() - started_s, time.process_time() - used_s
    rate = done * per_batch / elapsed_s
    cores = {"cores": used_s / elapsed_s}
    return {"images_per_s": rate, "patches_per_s": rate * images[0].grid.num_patches} | cores


def serve_flags(options: list[str]) -> dict[str, str]:
    """``--name value`` pairs as option names."""
    names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
    return dict(zip(names, options[1::2], strict=True))


def load(
    servers: list[tuple[psutil.Process, str]], mix: Path, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The same images through the server, from clients in processes of their own."""
    number = max(arguments.client_processes, len(servers))
    reports = [folder / f"report-{index}.json" for index in range(number)]
    options = ["--mix", str(mix), "--concurrency", str(max(arguments.clients // number, 1))]
    options += ["--duration", str(arguments.duration), "--timeout-s", "600"]
    options += ["--connections", str(arguments.connections)]
    before_s, started_s = sum(cpu_s(server) for server, _ in servers), time.perf_counter()
    clients = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "encoder_svc",
                "bench",
                "serve",
                "--target",
                servers[index % len(servers)][1],
                *options,
                "--json",
                str(path),
                "--seed",
                str(index),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index, path in enumerate(reports)
    ]
    for client in clients:
        if client.wait() != 0:
            raise SystemExit(f"bench serve failed with {client.returncode}")
    used_s, wall_s = sum(cpu_s(server) for server, _ in servers) - before_s, time.perf_counter() - started_s
    seen = [json.loads(path.read_text()) for path in reports]
    total = {
        name: sum(report["rates"][name] for report in seen)
        for name in ("images_per_s", "patches_per_s", "megabytes_per_s")
    }
    return total | {
        "p50": statistics.median(report["latency_s"]["p50"] for report in seen) * 1e3,
        "p99": max(report["latency_s"]["p99"] for report in seen) * 1e3,
        "server_cores": used_s / wall_s,
        "client_cores": sum(report["client_cpu_ratio"] for report in seen),
    }


if __name__ == "__main__":
    raise SystemExit(main())
