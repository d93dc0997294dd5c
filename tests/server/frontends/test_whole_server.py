"""A server process with front ends, from its command line to its exit code."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from encoder_svc.client import EncoderClient, UnavailableError
from tests.ports import free_port
from tests.serving import ENVIRONMENT, ServerProcess, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FRONT_ENDS = ("--frontend-processes", "2", "--device", "cpu")
# One image of this side takes more than a second.
BIG = ("--max-pixels", "100000000")
SIDE = 1600


def big(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_vl")


def calling(target: str, outcome: list[object]) -> threading.Thread:
    """A call that has begun, and will say what came of it."""

    def call() -> None:
        with EncoderClient(target, timeout_s=60) as client:
            try:
                outcome.extend(client.encode([big()]))
            except UnavailableError as error:
                outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("drain_s", "signals", "exit_code", "finishes"), [("30", 1, 0, True), ("0.1", 1, 4, False), ("30", 2, 4, False)]
)
def test_a_drain_waits_for_every_front_end(
    model: Path, drain_s: str, signals: int, exit_code: int, *, finishes: bool
) -> None:
    options = ("--model", model, *FRONT_ENDS, *BIG, "--drain-s", drain_s, "--metrics-port", "0")
    outcome: list[object] = []
    with ServerProcess(*options) as server:
        thread = calling(server.target, outcome)
        server.wait_until_busy()
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert server.process.wait(40) == exit_code
        thread.join()
        assert "Traceback" not in server.log
    assert (not isinstance(outcome[0], UnavailableError)) == finishes
    if not finishes:
        assert isinstance(outcome[0], UnavailableError)
        assert outcome[0].reason == "DRAINING"


def test_front_ends_end_with_a_server_that_is_killed(model: Path) -> None:
    with ServerProcess("--model", model, *FRONT_ENDS) as server:
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 2
        server.process.kill()
        deadline_s = time.monotonic() + 10
        while not all(map(has_ended, children)):
            assert time.monotonic() < deadline_s, children
            time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody reaps it, as in a container whose first process is not made for that."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_they_leave_a_terminal_s_signals_to_the_server(model: Path) -> None:
    with ServerProcess("--model", model, *FRONT_ENDS) as server:
        for child in psutil.Process(server.process.pid).children():
            child.send_signal(signal.SIGINT)
            child.send_signal(signal.SIGTERM)
        with EncoderClient(server.target, timeout_s=30) as client:
            client.encode([np.zeros((56, 56, 3), np.uint8)])
        assert server.stop() == 0


def test_a_port_that_is_taken_is_refused(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("serve", "--model", model, *FRONT_ENDS, "--port", str(port)),
            env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1, port {port}: the port is taken." in done.stderr


def test_the_port_of_another_server_s_front_ends_is_taken(model: Path) -> None:
    port = str(free_port())
    with ServerProcess("--model", model, *FRONT_ENDS, "--port", port):
        done = subprocess.run(
            command("serve", "--model", model, *FRONT_ENDS, "--port", port),
            env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, "the port is taken" in done.stderr) == (2, True)


@pytest.mark.parametrize("option", ["--cache-bytes", "--max-decoded-bytes"])
def test_memory_that_cannot_be_shared_refuses_the_start_by_the_options_that_ask_for_it(
    model: Path, option: str
) -> None:
    serve = command("serve", "--port", "0", "--model", model, *FRONT_ENDS, option, "100GiB")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 50000000; exec "$@"', "sh", *serve],
        check=False, capture_output=True, text=True, timeout=50, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert option.removeprefix("--").replace("-", "_") in said
    assert "GiB of memory that processes share" in said
