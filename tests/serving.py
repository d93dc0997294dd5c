"""A real server in a process of its own, for tests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ENCODER_")}


def command(*arguments: str | Path) -> list[str]:
    """The ``encoder-svc`` command of this checkout."""
    return [sys.executable, "-m", "encoder_svc", *map(str, arguments)]


def endless(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint that takes for ever to load: nobody writes into the pipe that its weights come from."""
    copy = folder / "endless"
    shutil.copytree(checkpoint, copy)
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    return copy


class ServerProcess:
    """``encoder-svc serve`` on a free port of this machine. Use it in a ``with``: ready inside, gone after.

    Args:
        wait: for it to be ready.
        environment: variables in addition to this process's.
    """

    def __init__(self, *arguments: str | Path, wait: bool = True, environment: Mapping[str, str] | None = None) -> None:
        self._arguments = arguments
        self._wait = wait
        # A CPU's dtype is the machine's to choose, and results must not be.
        pinned = {"ENCODER_DTYPE": "float32"} if "cpu" in arguments or not torch.cuda.is_available() else {}
        self._environment = ENVIRONMENT | pinned | dict(environment or {})
        self._log = Path(tempfile.mkstemp(prefix="encoder-svc-", suffix=".log")[1])

    def __enter__(self) -> Self:
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                command("serve", "--port", "0", *self._arguments), stderr=output, env=self._environment
            )
        if self._wait:
            self.target = f"127.0.0.1:{self._port()}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.unlink()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, pattern: str, timeout_s: float = 60) -> re.Match[str]:
        """Waits until the log holds ``pattern``."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if found := re.search(pattern, self.log):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server's log holds no {pattern!r}:\n{self.log}")

    def wait_for_port(self, port: int, timeout_s: float = 60) -> None:
        """Waits until it listens, which it does before it loads."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=10).close()
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline_s, self.log
                time.sleep(0.01)

    def wait_until_busy(self) -> None:
        """Waits until an image is in work. The server has metrics."""
        self._wait_for_metric("encoder_inflight_images", lambda images: images > 0)

    def wait_until_idle(self) -> None:
        """Waits until no image is. The server has metrics."""
        self._wait_for_metric("encoder_inflight_images", lambda images: images == 0)

    def _wait_for_metric(self, name: str, reached: Callable[[float], bool], timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
                if reached(float(re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)[1])):
                    return
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.01)

    @property
    def metrics_port(self) -> int:
        """Where a server that was started with ``--metrics-port 0`` has its metrics."""
        return int(self.wait_for_log(r"status page: http://\S+:(\d+)/")[1])

    def _port(self) -> int:
        return int(self.wait_for_log(r": serving .*:(\d+)")[1])

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout_s)

    def rss_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss
