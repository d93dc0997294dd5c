"""Start-up, health, deadlines, cancellation and drain of a real server process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import DeadlineError, EncoderClient, InvalidInputError, UnavailableError
from tests.ports import free_port
from tests.serving import ENVIRONMENT, ServerProcess, command, endless
from tests.tools import require_ipv6

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
BIG = ("--max-pixels", "100000000", "--max-request-patches", "1000000")


def health(target: str, service: str = "", timeout_s: float = 10) -> int:
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(request, timeout=timeout_s, wait_for_ready=True).status


def noise(side: int) -> np.ndarray:
    """An image whose encoding takes a while: attention grows with the fourth power of its side."""
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.parametrize("service", ["", "encoder.v1.Encoder"])
def test_a_ready_server_says_serving(server: Callable[..., ServerProcess], service: str) -> None:
    assert health(server("qwen2_vl").target, service) == SERVING


def test_a_server_that_loads_says_not_serving_and_refuses(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, port = endless(tiny_checkpoint("qwen3_vl"), tmp_path), free_port()
    with ServerProcess("--model", checkpoint, "--port", str(port), wait=False) as loading:
        loading.wait_for_port(port)
        assert health(f"127.0.0.1:{port}") == NOT_SERVING
        with EncoderClient(f"127.0.0.1:{port}") as client, pytest.raises(UnavailableError) as caught:
            client.info()
        assert caught.value.reason == "STARTING"
        assert loading.stop() == 0


@pytest.mark.alone
def test_health_answers_while_a_batch_runs(server: Callable[..., ServerProcess]) -> None:
    target = server("qwen2_vl", *BIG).target
    with EncoderClient(target) as client:
        results = []
        encoding = threading.Thread(target=lambda: results.extend(client.encode([noise(1600)])))
        encoding.start()
        slowest_s, num_checks = 0.0, 0
        while encoding.is_alive():
            started_s = time.monotonic()
            assert health(target) == SERVING
            slowest_s = max(slowest_s, time.monotonic() - started_s)
            num_checks += 1
        encoding.join()
    forward_s = results[0].timings.forward_s
    assert num_checks >= 3
    assert slowest_s < forward_s / 2


def test_reflection_lists_the_services(server: Callable[..., ServerProcess]) -> None:
    with grpc.insecure_channel(server("qwen2_vl").target) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [answer] = list(stub.ServerReflectionInfo(iter([request])))
    names = {service.name for service in answer.list_services_response.service}
    assert {"encoder.v1.Encoder", "grpc.health.v1.Health"} <= names


def test_a_call_that_outlasts_its_timeout_is_a_deadline_error(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen2_vl", *BIG).target) as client:
        with pytest.raises(DeadlineError):
            client.encode([noise(1650)], timeout_s=0.2)
        assert client.encode([noise(28)])[0].embeddings.any()


@pytest.mark.alone
def test_closing_a_stream_cancels_what_waits(server: Callable[..., ServerProcess]) -> None:
    with EncoderClient(server("qwen2_vl", *BIG, "--max-batch-images", "1").target) as client:
        arriving = client.stream([noise(1400)] * 8)
        first = next(arriving)
        arriving.close()
        started_s = time.monotonic()
        client.encode([noise(28)])
        waited_s = time.monotonic() - started_s
    # One batch may have begun; seven would take far longer.
    assert waited_s < 4 * first.timings.forward_s + 1


def test_without_a_model_a_tiny_one_is_served_and_said_so_loudly(photos: list[Path]) -> None:
    with ServerProcess() as embedded, EncoderClient(embedded.target) as client:
        assert client.info().family == "qwen2_5_vl"
        assert client.encode(photos[:1])[0].embeddings.any()
        assert "NO --model WAS GIVEN" in embedded.log
        assert "RANDOM weights" in embedded.log


def test_a_revision_of_no_model_is_refused() -> None:
    serve = command("serve", "--port", "0", "--revision", "main")
    done = subprocess.run(serve, check=False, capture_output=True, text=True, timeout=50, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--revision main: is for hub ids, and there is no --model.")


def test_the_configuration_is_printed_with_the_source_of_each_value(server: Callable[..., ServerProcess]) -> None:
    log = server("qwen2_vl", "--max-images", "7").log
    assert any(line.split() == ["max_images", "7", "flag"] for line in log.splitlines())
    assert any(line.split() == ["drain_s", "30.0", "default"] for line in log.splitlines())


def refused(*options: str | Path, environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Start-up that must be refused: seconds it took, and the text."""
    started_s = time.monotonic()
    done = subprocess.run(
        command("serve", *options),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT | (environment or {}),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return time.monotonic() - started_s, done.stderr.splitlines()[-1]


@pytest.mark.alone
def test_an_unknown_backend_is_refused_before_weights_are_read(tiny_checkpoint: Callable[[str], Path]) -> None:
    seconds, text = refused("--model", tiny_checkpoint("qwen2_vl"), "--mm-encoder-attn-backend", "FLASHY")
    assert "FLASHY" in text
    assert "TORCH_SDPA" in text
    assert seconds < 5


def test_an_unknown_key_in_the_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("modell: somewhere\n")
    assert "unknown key 'modell'" in refused("--config", file)[1]


def test_an_unknown_variable_is_refused() -> None:
    assert "ENCODER_MODLE" in refused(environment={"ENCODER_MODLE": "x"})[1]


def test_a_checkpoint_without_a_vision_tower_is_refused(tmp_path: Path, tiny_checkpoint) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "text-only"
    shutil.copytree(tiny_checkpoint("qwen2_vl"), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("visual.")}, folder / "model.safetensors")
    assert "holds no vision tower" in refused("--model", folder, "--port", "0")[1]


def test_a_language_model_without_vision_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "'llama' is not an architecture that is served" in refused("--model", tmp_path)[1]


def test_a_port_in_use_is_refused(server: Callable[..., ServerProcess], tiny_checkpoint) -> None:
    port = server("qwen2_vl").target.rsplit(":", 1)[1]
    assert "cannot listen" in refused("--model", tiny_checkpoint("qwen2_vl"), "--port", port)[1]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("while_the_model_is_made", [False, True])
def test_a_signal_during_start_up_ends_it_quietly_and_leaves_nothing(
    tmp_path: Path, signal_number: int, while_the_model_is_made: bool
) -> None:
    with subprocess.Popen(
        command("serve", "--port", "0"), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    ) as starting:
        assert starting.stderr is not None
        assert "configuration" in starting.stderr.readline()
        if while_the_model_is_made:
            while not list(tmp_path.glob("encoder-svc-*")):
                time.sleep(0.001)
        starting.send_signal(signal_number)
        _, log = starting.communicate(timeout=60)
    assert starting.returncode == 0
    assert "Traceback" not in log
    assert list(tmp_path.glob("encoder-svc-*")) == []


def test_a_stream_that_is_not_read_is_ended_and_others_are_served(tiny_checkpoint, photos: list[Path]) -> None:
    options = ("--device", "cpu", "--send-timeout-s", "1", "--max-pixels", "4000000")
    with ServerProcess("--model", tiny_checkpoint("qwen3_vl"), *options) as patient:
        with grpc.insecure_channel(patient.target, [("grpc.http2.bdp_probe", 0)]) as channel:  # a small window
            raw = encoder_pb2.RawImage(height=800, width=800, data=noise(800).tobytes())
            request = encoder_pb2.EncodeImagesRequest(images=[encoder_pb2.Image(raw=raw)] * 32)
            unread = encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request)
            patient.wait_for_log("STREAM_STALLED")
            with EncoderClient(patient.target) as client:
                assert client.encode(photos[:1])[0].embeddings.any()
            unread.cancel()
        assert "Traceback" not in patient.log


def test_a_caller_that_is_killed_while_it_is_answered_is_no_error(tiny_checkpoint) -> None:
    options = ("--device", "cpu", "--max-pixels", "4000000", "--metrics-port", "0")
    with ServerProcess("--model", tiny_checkpoint("qwen3_vl"), *options) as serving:
        code = (
            "import sys, time, numpy as np\n"
            "from encoder_svc.client import EncoderClient\n"
            "pixels = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)\n"
            "arriving = EncoderClient(sys.argv[1]).stream([pixels] * 32)\n"
            "next(arriving); print('first', flush=True); time.sleep(60)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, serving.target], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as caller:
            assert caller.stdout is not None
            assert caller.stdout.readline() == "first\n"
            time.sleep(1)
            caller.kill()
        assert health(serving.target) == SERVING
        serving.wait_until_idle()
        assert serving.stop() == 0
        assert "ERROR" not in serving.log
        assert "Traceback" not in serving.log


def test_a_request_id_that_is_too_long_is_refused(server: Callable[..., ServerProcess], photos: list[Path]) -> None:
    with EncoderClient(server("qwen2_vl").target) as client, pytest.raises(InvalidInputError) as caught:
        client.encode(photos[:1], request_id="x" * 257)
    assert caught.value.reason == "REQUEST_ID_TOO_LONG"


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("203.0.113.7", "not an address of this machine"),
        ("no.such.host.invalid", "the host is not known"),
        ("unix:/tmp/socket", "name a host or an address"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_refused_with_the_reason(tiny_checkpoint, host: str, why: str) -> None:
    assert why in refused("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--port", "0", "--host", host)[1]


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_is_listened_on(tiny_checkpoint, host: str) -> None:
    require_ipv6()
    options = ("--host", host, "--metrics-port", "0")
    with ServerProcess("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", *options) as serving:
        assert health(serving.target.replace("127.0.0.1", "[::1]")) == SERVING
        socket.create_connection(("::1", serving.metrics_port), timeout=10).close()
