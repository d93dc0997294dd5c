"""A server in a process of its own, for the benchmarks that load one."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))


def make_tiny(folder: Path) -> Path:
    """A tiny qwen2_5_vl with random weights, below ``folder``."""
    model = folder / "tiny"
    command = ["make-checkpoint", "--family", "qwen2_5_vl", str(model)]
    subprocess.run([sys.executable, "-m", "encoder_svc", *command], check=True, stdout=subprocess.DEVNULL)
    return model


@contextmanager
def running_server(model: Path, options: list[str], log: Path) -> Iterator[tuple[psutil.Process, str]]:
    """``encoder-svc serve`` on a free port, without a cache: its process and its target. Ended on the way out."""
    from demo import wait_for_port

    command = [sys.executable, "-m", "encoder_svc", "serve", "--model", str(model), "--port", "0", "--cache-bytes", "0"]
    with log.open("w") as output, subprocess.Popen([*command, *options], stderr=output) as server:
        try:
            yield psutil.Process(server.pid), f"127.0.0.1:{wait_for_port(server, log)}"
        finally:
            server.terminate()


def cpu_s(server: psutil.Process) -> float:
    """What a server has used of the CPU so far, its front ends' part included."""
    return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children()))


def metrics_url(log: Path) -> str:
    """Where a server that was started with ``--metrics-port 0`` says that its metrics are."""
    found = re.search(r"metrics and the status page: (http://\S+)", log.read_text())
    assert found is not None, "the server was started without metrics"
    return found[1]
