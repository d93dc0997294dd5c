"""A server whose CPU is several devices, each a process, from its command line to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import encoder_svc
from encoder_svc.client import AsyncEncoderClient, EncoderClient, RequestError
from tests.models.checkpoints import edit_tensors
from tests.server.in_process import pending, serving
from tests.serving import ENVIRONMENT, ServerProcess, command, endless

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.models.checkpoints import Tensors

DEVICES = ("--cpu-devices", "2", "--device", "cpu")


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen3_vl")


def image(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def processes_of(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def wait_until_ended(processes: Sequence[psutil.Process]) -> None:
    """Fails if one of them is still there after a while. One that nobody reaped has ended too."""
    deadline_s = time.monotonic() + 15
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s, process
            time.sleep(0.02)


@pytest.mark.parametrize("more", [[], ["--frontend-processes", "1"], ["--image-processing", "device"]])
def test_embeddings_are_those_of_one_device_to_the_bit(model: Path, more: list[str]) -> None:
    images = [image(side, side) for side in (56, 224, 448, 84, 616)]
    seen = []
    for devices in (DEVICES, ("--device", "cpu")):
        with ServerProcess("--model", model, *devices, *more) as server, EncoderClient(server.target) as client:
            seen.append([client.encode([one])[0].embeddings for one in images])
    for ours, theirs in zip(*seen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


async def test_all_of_them_encode_and_nothing_is_held_in_the_end(model: Path) -> None:
    async with serving(model, cpu_devices=2) as (inside, target):
        lanes = inside.core.engine._lanes
        busy = [0, 0]
        for number, lane in enumerate(lanes):
            submit = lane._runner.submit

            def counted(images: list, number: int = number, submit: Callable = submit) -> object:
                busy[number] += len(images)
                return submit(images)

            lane._runner.submit = counted
        async with AsyncEncoderClient(target, timeout_s=60) as client:
            await asyncio.gather(*(client.encode([image(280, seed)]) for seed in range(24)))
        assert sum(busy) == 24
        assert all(busy)
        assert not any(pending(inside.core).values())
        arenas = [arena for lane in lanes for arena in (lane._runner._images, lane._runner._embeddings)]
        deadline_s = time.monotonic() + 10  # the thread that waited for a batch lets go of it a little later
        while any(arena.taken_bytes for arena in arenas):
            assert time.monotonic() < deadline_s, [arena.taken_bytes for arena in arenas]
            await asyncio.sleep(0.01)


def encode_one(target: str, seed: int) -> np.ndarray:
    with EncoderClient(target, timeout_s=60) as client:
        return client.encode([image(280, seed)])[0].embeddings


def test_a_server_that_stops_leaves_none_behind(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES) as server:
        processes = processes_of(server)
        assert len(processes) == 2
        for process in processes:  # a terminal's signals are the server's
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        encode_one(server.target, 0)
        assert server.stop() == 0
        wait_until_ended(processes)
        assert "Traceback" not in server.log


def test_they_end_with_a_server_that_is_killed(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES) as server:
        processes = processes_of(server)
        server.process.kill()
        wait_until_ended(processes)


def test_they_give_way_to_the_servers_process(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES) as server:
        niceness = psutil.Process(server.process.pid).nice()
        assert all(process.nice() > niceness for process in processes_of(server))


@pytest.mark.parametrize(("how", "options"), [(signal.SIGKILL, ()), (signal.SIGSTOP, ("--watchdog-s", "5"))])
def test_one_that_is_lost_ends_the_server(model: Path, how: signal.Signals, options: tuple[str, ...]) -> None:
    with ServerProcess("--model", model, *DEVICES, *options, "--drain-s", "1") as server:
        processes = processes_of(server)
        with grpc.insecure_channel(server.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            processes[0].send_signal(how)
            if how == signal.SIGSTOP:  # nobody misses it until it has a batch
                with pytest.raises(RequestError) as caught:
                    encode_one(server.target, 0)
                assert caught.value.reason == "DEVICE_BROKEN"
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(30) == 3
        wait_until_ended(processes)
        assert "the device is broken" in server.log


def start_encoding_on_one_that_hangs(server: ServerProcess, processes: Sequence[psutil.Process]) -> threading.Thread:
    def encode() -> None:
        with contextlib.suppress(RequestError):
            encode_one(server.target, 0)

    for process in processes:
        process.send_signal(signal.SIGSTOP)
    encoding = threading.Thread(target=encode)
    encoding.start()
    server.wait_until_busy()
    return encoding


def test_a_drain_does_not_wait_for_one_that_hangs(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES, "--drain-s", "0.5", "--metrics-port", "0") as server:
        processes = processes_of(server)
        encoding = start_encoding_on_one_that_hangs(server, processes)
        server.process.terminate()
        assert server.process.wait(20) == 4
        encoding.join()
        wait_until_ended(processes)


def test_one_that_ends_in_a_drain_is_said_by_the_exit_code(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES, "--metrics-port", "0") as server:
        processes = processes_of(server)
        encoding = start_encoding_on_one_that_hangs(server, processes)
        server.process.terminate()
        server.wait_for_log("draining")
        for process in processes:
            process.kill()
        assert server.process.wait(20) == 3
        encoding.join()


def test_the_end_of_one_that_encodes_is_said_once(model: Path) -> None:
    with ServerProcess("--model", model, *DEVICES, "--drain-s", "1", "--metrics-port", "0") as server:
        processes = processes_of(server)
        encoding = start_encoding_on_one_that_hangs(server, processes)
        for process in processes:
            process.kill()
        assert server.process.wait(20) == 3
        encoding.join()
        said = [line for line in server.log.splitlines() if " CRITICAL " in line or " ERROR " in line]
        assert len(said) == 1, said
        assert "its process ended" in said[0]
        assert "Traceback" not in server.log


def test_what_lies_in_the_working_directory_is_not_imported(model: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('a module of the working directory')")
    script = Path(tmp_path / "bin" / "encoder-svc")  # as a package's script: the folder it lies in is looked in
    script.parent.mkdir()
    script.write_text("from encoder_svc.cli import main; raise SystemExit(main())")
    path = str(Path(encoder_svc.__file__).parents[1])
    for more in (DEVICES, ("--frontend-processes", "1")):
        said = []
        with subprocess.Popen(
            [sys.executable, str(script), "serve", "--port", "0", "--model", str(model), *more],
            cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        ) as server:  # fmt: skip
            for line in server.stderr:
                said.append(line)
                if ": serving " in line:
                    server.terminate()
        assert server.returncode == 0, "".join(said)
        assert "Traceback" not in "".join(said)


def test_batches_have_room_beside_small_limits(model: Path) -> None:
    limits = ("--max-request-patches", "256", "--max-image-pixels", "65536", "--max-decoded-bytes", "1")
    with (
        ServerProcess("--model", model, *DEVICES, *limits, "--cache-bytes", "0") as server,
        EncoderClient(server.target, timeout_s=60) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        list(pool.map(lambda seed: client.encode([image(256, seed)]), range(72)))
        assert "did not fit" not in server.log


def without_a_tensor(tensors: Tensors) -> None:
    del tensors["model.visual.patch_embed.proj.bias"]


def with_nan(tensors: Tensors) -> None:
    tensors["model.visual.patch_embed.proj.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "said"), [(without_a_tensor, "patch_embed.proj.bias"), (with_nan, "NaN or infinity")]
)
def test_a_model_that_cannot_be_served_refuses_the_start(
    model: Path, tmp_path: Path, change: Callable[[Tensors], None], said: str
) -> None:
    shutil.copytree(model, tmp_path / "spoilt")
    edit_tensors(tmp_path / "spoilt", change)
    done = serve("--model", tmp_path / "spoilt", *DEVICES)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_signal_while_they_load_ends_all(model: Path, tmp_path: Path) -> None:
    with ServerProcess("--model", endless(model, tmp_path), *DEVICES, wait=False) as server:
        server.wait_for_log("operations:")
        processes = processes_of(server)
        assert len(processes) == 2
        assert server.stop() == 0
        wait_until_ended(processes)


def test_a_signal_while_they_import_ends_all_at_once(model: Path, tmp_path: Path) -> None:
    slow = 'import sys, time\nif "encoder_svc.server.devices" in sys.orig_argv: time.sleep(60)\n'
    (tmp_path / "sitecustomize.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), str(Path(encoder_svc.__file__).parents[1])])
    with ServerProcess("--model", model, *DEVICES, wait=False, environment={"PYTHONPATH": path}) as server:
        server.wait_for_log("devices: 2 processes")
        processes = processes_of(server)
        assert len(processes) == 2
        assert server.stop() == 0
        wait_until_ended(processes)


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_ends_while_it_loads_is_said(model: Path, tmp_path: Path, which: int) -> None:
    with ServerProcess("--model", endless(model, tmp_path), *DEVICES, wait=False) as server:
        server.wait_for_log("operations:")
        processes = processes_of(server)
        processes[which].kill()
        assert server.process.wait(30) == 3
        wait_until_ended(processes)
        assert "the process of a device ended while it loaded" in server.log


def test_a_gpu_is_not_divided(model: Path) -> None:
    done = serve("--model", model, "--device", "cuda", "--cpu-devices", "2")
    assert done.returncode == 2
    assert "cuda" in done.stderr.splitlines()[-1]


def serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("serve", "--port", "0", *arguments),
        check=False, capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip
