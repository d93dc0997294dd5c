"""The process of one device: loads the model, then encodes one batch after the other.

Its main thread does nothing else. Another listens, so that it is known at once when the server's process is gone, and
so that a short batch that comes while a long one runs goes between two layers of that (engine/gaps.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import cached_property, partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from encoder_svc.allocator import use_one_heap
from encoder_svc.config import Config
from encoder_svc.engine.gaps import Job
from encoder_svc.errors import AttentionKernelError, StartupError
from encoder_svc.garbage import look_for_cycles_rarely, spare_what_is_loaded
from encoder_svc.observability.logs import configure_logs
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.start import StartPhases
from encoder_svc.server.info import limits_of, model_facts
from encoder_svc.server.loading import Loader
from encoder_svc.server.shared_images import image_of
from encoder_svc.transport.arena import ArenaView

if TYPE_CHECKING:
    from encoder_svc.engine.runner import DeviceRunner


# What callers wait for goes first: a refusal took a third of a second beside two of these, and takes 8 ms.
_NICENESS: Final = 10


def run_device(link: int, images: int, embeddings: int) -> int:
    """Encodes until the server's process, at the other end of ``link``, closes it or ends.

    Args:
        link: descriptor of a connected socket; the others are those of shared files.
    """
    look_for_cycles_rarely()
    use_one_heap()
    os.nice(_NICENESS)
    # A terminal's Ctrl-C comes to every process. When to end is the server's process to say.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)
    return _Device(Connection(link), images, embeddings).run()


class _Device:
    def __init__(self, link: Connection, images: int, embeddings: int) -> None:
        self._link = link
        self._files = (images, embeddings)
        self._runner: DeviceRunner | None = None
        self._jobs: SimpleQueue[Job[None]] = SimpleQueue()

    def run(self) -> int:
        asked = json.loads(self._link.recv_bytes())
        threading.Thread(target=self._listen, name="link", daemon=True).start()
        config = Config(**asked["config"])
        says_all = config.log_level == "error" or not asked["is_quiet"]
        configure_logs(config.log_level if says_all else "warning", config.log_format, sys.stderr)
        try:
            self._runner = self._load(config, asked["model"], asked["num_threads"])
        except StartupError as error:
            self._say(refused=str(error))
            return 2
        spare_what_is_loaded()
        while True:
            self._jobs.get()()

    def _load(self, config: Config, model: str, num_threads: int) -> DeviceRunner:
        loader = Loader(config, model, Metrics(), StartPhases(0.0))
        torch.set_num_threads(min(torch.get_num_threads(), num_threads))  # fewer where the operator says so
        tower = loader.load_tower(lambda phase: self._say(phase=phase))
        runner, max_batch_patches = loader.make_runner(tower)
        info = model_facts(tower, limits_of(config)).info
        self._say(loaded={"info": info.SerializeToString().hex(), "max_batch_patches": max_batch_patches})
        return runner

    def _listen(self) -> None:
        """The process ends with the link: it may be in the midst of a forward, or hang in one."""
        try:
            while True:
                batch = json.loads(self._link.recv_bytes())
                is_beside = batch.pop("is_beside")
                job = Job(partial(self._answer, **batch))
                self._jobs.put(job)
                if is_beside and self._runner is not None and self._runner.gaps is not None:
                    self._runner.gaps.offer(job)
        except (EOFError, OSError):
            os._exit(0)

    def _answer(self, batch: int, images: list[dict[str, Any]], rows: list[tuple[int, int]]) -> None:
        try:
            result = self._encode(images, rows)
        except Exception as error:
            self._say(batch=batch, error=self._describe(error))
        else:
            self._say(batch=batch, result=result)

    def _encode(self, images: list[dict[str, Any]], rows: list[tuple[int, int]]) -> dict[str, Any]:
        """Encodes images that lie in shared memory.

        Args:
            rows: where each image's embeddings shall lie, and how many bytes they are.

        Returns:
            What :class:`encoder_svc.engine.device.BatchResult` says, but for the embeddings: which of them are finite.
        """
        assert self._runner is not None
        given, wanted = self._memory
        batch = self._runner.submit([image_of(fields, given.view) for fields in images]).wait()
        began_s = time.perf_counter()
        for data, (offset, num_bytes) in zip(batch.embeddings, rows, strict=True):
            if data is not None:
                np.copyto(np.asarray(wanted.view(offset, num_bytes)), np.asarray(data))
        return {
            "are_finite": [data is not None for data in batch.embeddings],
            "build_s": batch.build_s,
            "h2d_s": batch.h2d_s,
            "resize_s": batch.resize_s,
            "forward_s": batch.forward_s,
            "d2h_s": batch.d2h_s + time.perf_counter() - began_s,
            "split_s": batch.split_s,
        }

    @cached_property
    def _memory(self) -> tuple[ArenaView, ArenaView]:
        """Images, and embeddings. Their size is known once the model is loaded."""
        images, embeddings = self._files
        return ArenaView(images, writable=True), ArenaView(embeddings, writable=True)

    def _describe(self, error: Exception) -> dict[str, Any]:
        assert self._runner is not None
        kernel = None
        if isinstance(error, AttentionKernelError):
            kernel = [error.backend, error.implementation, error.why]
        return {
            "text": f"{type(error).__name__}: {error}",
            "out_of_memory": self._runner.is_out_of_memory(error),
            "kernel": kernel,
        }

    def _say(self, **message: Any) -> None:
        """To the server's process, from the main thread."""
        try:
            self._link.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(0)
