#!/usr/bin/env python3
"""What a server still does when three times as much is asked of it as it can do.

    python benchmarks/overload.py [--model DIR] [--mix FILE] [--rounds 2] [-- SERVE OPTIONS …]

Each round measures the capacity (closed loop, as many clients as the queue has room for), then the goodput in an open
loop at three times that rate.
Server and load generator share the machine: the last columns say how many cores each of them took. Without --model:
tiny qwen2_5_vl; always without a cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from support.arguments import CLIENTS, PATCHES, ROUNDS, SECONDS
from support.server import cpu_s, make_tiny, running_server

ROOT = Path(__file__).resolve().parent.parent

TIMES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--mix", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=ROUNDS, default=2, metavar="N")
    parser.add_argument("--clients", type=CLIENTS, default=32, metavar="N", help="of the closed loop; none refused")
    parser.add_argument("--duration", type=SECONDS, default=10.0, metavar="SECONDS")
    parser.add_argument("--max-queued-patches", type=PATCHES, default=60_000, metavar="N")
    parser.add_argument("serve", nargs="*", metavar="SERVE OPTIONS")
    arguments = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_tiny(Path(folder))
        options = ["--device", "cpu", "--max-queued-patches", str(arguments.max_queued_patches), *arguments.serve]
        with running_server(model, options, Path(folder) / "server.log") as (server, target):
            for _ in range(arguments.rounds):
                one_round(server, target, arguments, Path(folder) / "report.json")
    return 0


def one_round(server: psutil.Process, target: str, arguments: argparse.Namespace, report: Path) -> None:
    load = ["--target", target, "--duration", str(arguments.duration), "--warmup-s", "2", "--json", str(report)]
    load += ["--mix", str(arguments.mix)] if arguments.mix else []
    capacity = Load(server, [*load, "--concurrency", str(arguments.clients)], report)
    rate = TIMES * capacity.report["rates"]["requests_per_s"]
    overload = Load(server, [*load, "--rate", f"{rate:.1f}", "--timeout-s", "30"], report)
    ratio = overload.patches_per_s / capacity.patches_per_s
    print("capacity ", capacity)
    print("overload ", overload, f"goodput {ratio:.2f} of the capacity", flush=True)


class Load:
    """One run of ``encoder-svc bench serve``, and what the server took for it."""

    def __init__(self, server: psutil.Process, options: list[str], report: Path) -> None:
        before_s, started_s = cpu_s(server), time.perf_counter()
        self.rss_mb: list[float] = []
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(server, ended))
        watcher.start()
        subprocess.run(
            [sys.executable, "-m", "encoder_svc", "bench", "serve", *options],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ended.set()
        watcher.join()
        self.server_cores = (cpu_s(server) - before_s) / (time.perf_counter() - started_s)
        self.report: dict[str, Any] = json.loads(report.read_text())

    def _watch(self, server: psutil.Process, ended: threading.Event) -> None:
        while not ended.wait(0.25):
            self.rss_mb.append(sum(one.memory_info().rss for one in (server, *server.children())) / 1e6)

    @property
    def patches_per_s(self) -> float:
        return float(self.report["rates"]["patches_per_s"])

    def __str__(self) -> str:
        report, (low_mb, high_mb) = self.report, (min(self.rss_mb), max(self.rss_mb))
        reasons = ", ".join(f"{error['count']} {error['reason']}" for error in report["errors"])
        text = f"{self.patches_per_s:7,.0f} patches/s; latency p50 {_ms(report['latency_s'])}; RSS {low_mb:.0f} to "
        text += f"{high_mb:.0f} MB; cores: server {self.server_cores:.2f}, generator {report['client_cpu_ratio']:.2f}"
        return text + (f"; refused in p50 {_ms(report['failure_latency_s'])} ({reasons})" if reasons else "")


def _ms(distribution: dict[str, float]) -> str:
    p50, p95, p99 = (distribution[name] * 1e3 for name in ("p50", "p95", "p99"))
    return f"{p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
