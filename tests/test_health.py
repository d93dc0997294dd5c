"""``encoder-svc health`` against real servers, in each state that one can be in."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.client import EncoderClient
from tests.ports import free_port
from tests.serving import ENVIRONMENT, ServerProcess, command, endless

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def health(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("health", *arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT | (environment or {}),
    )


@pytest.mark.parametrize("service", [[], ["--service", ""], ["--service", "encoder.v1.Encoder"]])
def test_a_server_that_serves_gives_0(server: Callable[..., ServerProcess], service: list[str]) -> None:
    target = server("qwen2_vl").target
    done = health("--target", target, *service)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{target}: SERVING\n", "")


def test_a_server_that_loads_gives_1(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, port = endless(tiny_checkpoint("qwen2_vl"), tmp_path), free_port()
    with ServerProcess("--model", checkpoint, "--port", str(port), wait=False) as loading:
        loading.wait_for_port(port)
        done = health("--target", f"127.0.0.1:{port}")
        assert loading.stop() == 0
    assert done.returncode == 1
    assert done.stderr.startswith(f"127.0.0.1:{port}: NOT_SERVING. It is starting, draining or broken")


def test_a_server_that_drains_gives_1(tiny_checkpoint: Callable[[str], Path]) -> None:
    large = ("--max-pixels", "100000000", "--max-request-patches", "1000000", "--metrics-port", "0")
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), *large) as draining:
        with EncoderClient(draining.target) as client:
            noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)
            encoding = threading.Thread(target=lambda: client.encode([noise]))
            encoding.start()
            draining.wait_until_busy()
            draining.process.send_signal(signal.SIGTERM)
            draining.wait_for_log("draining")
            done = health("--target", draining.target)
            encoding.join()
        assert draining.process.wait(30) == 0
    assert done.returncode == 1
    assert ": NOT_SERVING. " in done.stderr


def test_where_nothing_listens_it_says_so_and_gives_1() -> None:
    done = health("--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("encoder-svc health: Nothing answers at 127.0.0.1:1: ")
    assert done.stderr.endswith(" [UNREACHABLE]\n")


def test_what_does_not_answer_in_time_gives_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        target = f"127.0.0.1:{deaf.getsockname()[1]}"
        done = health("--target", target, "--timeout-s", "0.3")
    assert (done.returncode, done.stderr) == (
        1,
        f"encoder-svc health: {target} did not answer within 0.3 s. [DEADLINE_EXCEEDED]\n",
    )


def test_a_service_that_is_none_is_named(server: Callable[..., ServerProcess]) -> None:
    target = server("qwen2_vl").target
    done = health("--target", target, "--service", "encoder.v9.Encoder")
    assert (done.returncode, done.stderr) == (
        1,
        f"encoder-svc health: {target} knows no service 'encoder.v9.Encoder'. [INTERNAL]\n",
    )


def test_without_a_target_it_asks_the_port_of_the_environment(server: Callable[..., ServerProcess]) -> None:
    target = server("qwen2_vl").target
    done = health(environment={"ENCODER_HOST": "0.0.0.0", "ENCODER_PORT": target.split(":")[1]})
    assert (done.returncode, done.stdout) == (0, f"{target}: SERVING\n")


def test_the_variables_that_kubernetes_adds_beside_a_service_are_no_port() -> None:
    done = health("--timeout-s", "1", environment={"ENCODER_PORT": "tcp://10.0.0.1:6000"})
    assert "127.0.0.1:50051" in done.stderr  # where nobody serves: whoever takes that port in these tests is alone


def test_it_starts_light() -> None:
    """Every few seconds in every container: no array library, let alone torch."""
    probe = (
        "import sys, encoder_svc.cli as cli; cli.main(['health', '--target', '127.0.0.1:1']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'yaml', 'safetensors'} & set(sys.modules)))"
    )
    arguments = [command()[0], "-c", probe]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "[]\n"
