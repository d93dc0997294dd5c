"""What is said when the processes of devices are started."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from encoder_svc.config import Config
from encoder_svc.errors import ConfigError
from encoder_svc.server.devices import start
from encoder_svc.server.devices.start import DeviceProcesses

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], DeviceProcesses]:
    """Makes so many devices on so many cores, with processes that are none."""

    def make(num_devices: int, num_cores: int) -> DeviceProcesses:
        nobody = SimpleNamespace(link=SimpleNamespace(send_bytes=lambda _: None), images=0, embeddings=0)
        monkeypatch.setattr(start._Process, "start", lambda: nobody)
        monkeypatch.setattr(start, "usable_cores", lambda: num_cores)
        return DeviceProcesses(Config(cpu_devices=num_devices), "model")

    return make


@pytest.mark.parametrize(("num_devices", "num_cores", "num_unused"), [(3, 8, 2), (2, 8, 0), (4, 2, 0)])
def test_cores_that_no_device_gets_are_said(
    devices: Callable[[int, int], DeviceProcesses],
    caplog: pytest.LogCaptureFixture,
    num_devices: int,
    num_cores: int,
    num_unused: int,
) -> None:
    devices(num_devices, num_cores)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(num_unused)
    assert not num_unused or warnings[0].startswith(f"devices: {num_unused} of {num_cores} cores encode nothing")


@pytest.mark.parametrize("which", ["images", "embeddings"])
def test_memory_that_cannot_be_had_is_said_to_be_the_devices(
    devices: Callable[[int, int], DeviceProcesses], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    sizes = {"images": 1 << 20, "embeddings": 1 << 21}
    monkeypatch.setattr(start, "image_bytes", lambda *_: sizes["images"])
    monkeypatch.setattr(start, "batch_bytes", lambda *_: 0)
    monkeypatch.setattr(start, "embedding_bytes", lambda *_: sizes["embeddings"])

    def mapped(file: int, num_bytes: int) -> None:
        if num_bytes == sizes[which]:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(start, "Arena", mapped)
    with pytest.raises(ConfigError, match="cpu_devices: ask for") as caught:
        devices(2, 2).open(SimpleNamespace(info=None), 4_096)
    assert "frontend_processes" not in str(caught.value)
