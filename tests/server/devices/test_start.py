"""What is said when the processes of devices are started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from encoder_svc.config import Config
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
