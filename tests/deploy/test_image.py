"""An image that scripts/build_image_daemonless.sh built, run: marker ``image``.

    scripts/build_image_daemonless.sh cpu && pytest -m image tests/deploy/test_image.py

bubblewrap stands in for a container engine: the image's files read-only, its variables, user, volumes and entry point;
the process as number 1; the machine's network.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from encoder_svc.client import EncoderClient
from tests.ports import free_port
from tests.tools import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.image

IMAGE = Path(os.environ.get("IMAGE_STORE", "/var/tmp/encoder-svc-image")) / "cpu"


@cache
def config() -> dict[str, Any]:
    return json.loads((IMAGE / "image.json").read_text())["Docker"]["config"]


def in_image(*command: str, environment: dict[str, str], mounts: dict[Path, str]) -> list[str]:
    """The bubblewrap command that runs a command in the image."""
    user, group = config()["User"].split(":")
    arguments = [
        require("bwrap"), "--ro-bind", str(IMAGE / "rootfs"), "/", "--proc", "/proc", "--dev", "/dev",
        "--unshare-user", "--uid", user, "--gid", group, "--unshare-pid", "--as-pid-1", "--unshare-ipc",
        "--die-with-parent", "--clearenv", "--chdir", config()["WorkingDir"],
        "--tmpfs", "/mnt",  # mount points can be made there
    ]  # fmt: skip
    for volume in config()["Volumes"]:
        arguments += ["--tmpfs", volume]
    for outside, inside in mounts.items():
        arguments += ["--ro-bind", str(outside), inside]
    for name, value in (dict(entry.split("=", 1) for entry in config()["Env"]) | environment).items():
        arguments += ["--setenv", name, value]
    return [*arguments, *command]


@contextmanager
def running(
    *flags: str, environment: dict[str, str], mounts: dict[Path, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A container of the image, as ``docker run --read-only`` would start it."""
    command = in_image(*config()["Entrypoint"], *flags, environment=environment, mounts=mounts)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def health(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The image's own HEALTHCHECK, as an engine runs it: in the container, with its variables."""
    kind, *command = config()["Healthcheck"]["Test"]
    assert kind == "CMD"
    return subprocess.run(
        in_image(*command, environment=environment, mounts={}), check=False, capture_output=True, text=True, timeout=30
    )


def wait_until_healthy(environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + 120
    while health(environment).returncode != 0:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.5)


def test_a_container_encodes_is_healthy_and_ends_well(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """Flags, variables and a mounted file set what each should; the root file system is read-only throughout."""
    log, file = tmp_path / "log", tmp_path / "server.yaml"
    file.write_text("max_images: 5\ndrain_s: 7\n")
    variables = {"ENCODER_PORT": str(free_port()), "ENCODER_METRICS_PORT": str(free_port()), "ENCODER_MAX_IMAGES": "6"}
    assert health(variables).returncode == 1
    mounts = {tiny_checkpoint("qwen3_vl"): "/mnt/model", file: "/mnt/server.yaml"}
    flags = ["--model", "/mnt/model", "--mm-encoder-attn-backend", "TORCH_NAIVE"]
    with running("--config", "/mnt/server.yaml", *flags, environment=variables, mounts=mounts, log=log) as process:
        wait_until_healthy(variables, process, log)
        with EncoderClient(f"127.0.0.1:{variables['ENCODER_PORT']}") as client:
            info = client.info()
            assert client.encode(photos[:2])[1].embeddings.any()
        [server] = psutil.Process(process.pid).children()
        server.terminate()
        assert process.wait(60) == 0
    settings = {words[0]: words[1:] for line in log.read_text().splitlines() if len(words := line.split()) == 3}
    assert settings["host"] == ["0.0.0.0", "environment"]
    assert settings["max_images"] == ["6", "environment"]
    assert settings["drain_s"] == ["7.0", "file"]
    assert settings["mm_encoder_attn_backend"] == ["TORCH_NAIVE", "flag"]
    assert (info.family, info.limits.max_images, info.attention.backend) == ("qwen3_vl", 6, "TORCH_NAIVE")
    assert "stopped" in log.read_text()


def test_a_backend_that_the_device_has_not_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with running("--mm-encoder-attn-backend", "FLASH_ATTN", environment={}, mounts={}, log=tmp_path / "log") as process:
        assert process.wait(60) == 2
    [*_, last] = (tmp_path / "log").read_text().splitlines()
    assert "FLASH_ATTN" in last


def test_the_process_is_number_1_an_ordinary_user_and_writes_to_the_volumes_alone() -> None:
    probe = (
        "import os, tempfile; print(os.getpid(), os.getuid(), os.getgid()); tempfile.TemporaryFile();"
        "open('/var/cache/encoder-svc/x', 'w'); open('/opt/encoder-svc/x', 'w')"
    )
    done = subprocess.run(
        in_image("python3", "-c", probe, environment={}, mounts={}), check=False, capture_output=True, text=True
    )
    assert done.stdout == "1 10001 10001\n"
    assert "Read-only file system: '/opt/encoder-svc/x'" in done.stderr


def test_the_image_holds_no_package_configuration_of_whoever_built_it() -> None:
    root = IMAGE / "rootfs"
    assert [path for name in ("etc/pip.conf", "root/.config/pip", "root/.pip") if (path := root / name).exists()] == []
