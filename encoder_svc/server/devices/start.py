"""Starts the processes of a server's devices, and ends them."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import BrokenDeviceError, StartupError
from encoder_svc.images.processor import PIXEL_VALUE_DTYPES
from encoder_svc.platforms.cores import usable_cores
from encoder_svc.server.devices.remote import RemoteDevice
from encoder_svc.server.info import DTYPE_NAMES
from encoder_svc.server.own_processes import python_module
from encoder_svc.server.shared_memory import (
    DEVICE_EMBEDDING_OPTIONS,
    DEVICE_IMAGE_OPTIONS,
    asked_for_by,
    batch_bytes,
    embedding_bytes,
    image_bytes,
)
from encoder_svc.transport.arena import Arena, new_shared_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc.config import Config
    from encoder_svc.server.info import ModelFacts

# The link's end is the process's, in the midst of a forward too; not of one that hangs or was stopped.
_FAREWELL_S: Final = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Process:
    """One of them. ``images`` and ``embeddings`` are shared files."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    link: Connection
    images: int
    embeddings: int

    @classmethod
    def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        images, embeddings = new_shared_file("encoder-svc-batches"), new_shared_file("encoder-svc-rows")
        passed = (theirs.fileno(), images, embeddings)
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own module
                python_module("encoder_svc.server.devices", *passed),
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                # A terminal's signals are for the server's process. Not a session of its own: where Linux shares cores
                # by sessions (sched_autogroup), that it is nice would count for nothing.
                process_group=0,
            )
        return cls(process, ours, Connection(os.dup(ours.fileno())), images, embeddings)

    def end(self) -> None:
        """The process ends with its link."""
        self.socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        for file in (self.images, self.embeddings):
            os.close(file)


class DeviceProcesses:
    """Several devices, alike, each with an equal part of the cores."""

    def __init__(self, config: Config, model: str) -> None:
        self._config = config
        self._runners: list[RemoteDevice] = []
        self._processes = [_Process.start() for _ in range(config.cpu_devices)]
        num_cores = usable_cores()
        num_threads = max(num_cores // config.cpu_devices, 1)
        logger.info("devices: %d processes, with torch's threads %d each", config.cpu_devices, num_threads)
        num_unused = num_cores - num_threads * config.cpu_devices
        if num_unused > 0:
            logger.warning(
                "devices: %d of %d cores encode nothing: --cpu-devices %d does not divide them",
                num_unused,
                num_cores,
                config.cpu_devices,
            )
        for number, process in enumerate(self._processes):
            # All would say the same.
            asked = {"config": asdict(config), "model": model, "num_threads": num_threads, "is_quiet": number > 0}
            process.link.send_bytes(json.dumps(asked).encode())

    def wait_until_loaded(self, phase_ended: Callable[[str], object]) -> tuple[encoder_pb2.GetModelInfoResponse, int]:
        """
        Args:
            phase_ended: is told of the phases of the first one's start.

        Returns:
            What GetModelInfo answers, and the largest batch, in patches.

        Raises:
            StartupError: one of them cannot serve the model.
            BrokenDeviceError: one of them ended.
        """
        first, *others = (process.link for process in self._processes)
        still_loading = {first, *others}
        while still_loading:
            # Of all, for as long as one loads: one that ends is missed at once, however long another takes.
            for link in wait([first, *others]):
                assert isinstance(link, Connection)
                message = _received(link)
                if "loaded" in message:
                    still_loading.remove(link)
                    loaded = message["loaded"]
                elif link is first:
                    phase_ended(message["phase"])
        return encoder_pb2.GetModelInfoResponse.FromString(bytes.fromhex(loaded["info"])), loaded["max_batch_patches"]

    def open(self, facts: ModelFacts, max_batch_patches: int) -> list[RemoteDevice]:
        """The devices, ready for batches.

        Raises:
            ConfigError: the memory that the config asks for cannot be had.
        """
        info, config = facts.info, self._config
        num_embeddings = embedding_bytes(config, facts)
        num_images = image_bytes(config, facts) + batch_bytes(config, facts, max_batch_patches)
        for process in self._processes:
            with asked_for_by(DEVICE_IMAGE_OPTIONS, num_images):
                images = Arena(process.images, num_images)
            with asked_for_by(DEVICE_EMBEDDING_OPTIONS, num_embeddings):
                embeddings = Arena(process.embeddings, num_embeddings)
            device = RemoteDevice(
                process.link,
                images,
                embeddings,
                row_bytes=info.width * PIXEL_VALUE_DTYPES[DTYPE_NAMES[info.dtype]].itemsize,
                merge_size=info.spatial_merge_size,
            )
            self._runners.append(device)
        return [*self._runners]

    def call_when_lost(self, call: Callable[[], object]) -> None:
        """``call`` is called in a thread when one of them is gone."""
        for runner in self._runners:
            runner.call_when_lost(call)

    def kill(self) -> None:
        """Ends them at once, also while they import what they need and hear nothing. For a process that ends itself."""
        for process in self._processes:
            process.process.kill()

    def close(self) -> None:
        """Ends them."""
        self.call_when_lost(lambda: None)
        for process in self._processes:
            process.end()


def _received(link: Connection) -> dict[str, Any]:
    """What a process says next, unless it is that it cannot serve."""
    try:
        message: dict[str, Any] = json.loads(link.recv_bytes())
    except (EOFError, OSError):
        raise BrokenDeviceError("the process of a device ended while it loaded; its own last words are above") from None
    if "refused" in message:
        raise StartupError(message["refused"])
    return message
