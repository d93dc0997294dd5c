"""From a config to a core: first everything that can be refused without reading a weight, then the weights."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from encoder_svc.cache.promises import Promises
from encoder_svc.cache.single_flight import SingleFlight
from encoder_svc.cache.store import EmbeddingStore
from encoder_svc.config import platform_switches
from encoder_svc.engine.admission import Admission
from encoder_svc.engine.engine import Engine
from encoder_svc.engine.graphs import bucket_sizes
from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.errors import ConfigError
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.ops_choice import refuse_quantisation
from encoder_svc.models.tower import VisionTower, load_tower, make_attention
from encoder_svc.observability.device import DeviceWatch
from encoder_svc.platforms import platform_for_device, resolve_device
from encoder_svc.platforms.cores import usable_cores
from encoder_svc.server.first_image import encode_first_image
from encoder_svc.server.info import DTYPE_NAMES, ModelFacts, budgets_of, limits_of, model_facts
from encoder_svc.server.local_core import LocalCore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.config import Config
    from encoder_svc.engine.device import Runner
    from encoder_svc.engine.work import Work
    from encoder_svc.observability.metrics import Metrics
    from encoder_svc.observability.start import StartPhases
    from encoder_svc.server.devices.start import DeviceProcesses
    from encoder_svc.transport.arena import Arena

logger = logging.getLogger(__name__)

# A GPU is full with sixteen small images or three large ones, and runs so many as one graph. A CPU is full with one,
# and a long batch only makes others wait.
_MAX_BATCH_PATCHES = 16_384
_MAX_BATCH_PATCHES_ON_CPU = 4_096


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to encode.

    Attributes:
        land_in: see :meth:`encoder_svc.engine.runner.DeviceRunner.land_in`.
        close: ends the processes of devices, once nothing is encoded any more. Takes a while.
    """

    facts: ModelFacts
    core: LocalCore
    land_in: Callable[[Arena], None]
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Devices:
    """Those that the model was loaded on; see :class:`Loaded`.

    Attributes:
        call_when_lost: what it is given is called in a thread when one of them is gone.
    """

    runners: list[Runner]
    facts: ModelFacts
    max_batch_patches: int
    land_in: Callable[[Arena], None] = lambda arena: None
    call_when_lost: Callable[[Callable[[], object]], None] = lambda call: None
    close: Callable[[], None] = lambda: None


class Loader:
    """What is decided before a weight is read, and :meth:`load`, which reads them."""

    def __init__(self, config: Config, model: str, metrics: Metrics, phases: StartPhases) -> None:
        """
        Args:
            phases: of the process's start so far; :meth:`load` ends all but the last.

        Raises:
            StartupError: the checkpoint, the device or the attention backend cannot be served.
        """
        self._config = config
        self._model = model
        self._metrics = metrics
        self._processes: DeviceProcesses | None = None
        self.phases = phases
        # torch counts the machine's cores, not those that a container's quota leaves.
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self._device = resolve_device(config.device)
        if config.cpu_devices > 1:
            refuse_cpu_devices(self._device)
        self._platform = platform_for_device(self._device, platform_switches(config))
        self._dtype = self._platform.default_dtype() if config.dtype == "auto" else config.dtype
        phases.end("device")
        self._checkpoint = Checkpoint(model, revision=config.revision)
        phases.end("checkpoint")
        refuse_quantisation(config.quantization, self._device, self._dtype)
        self._settings = self._checkpoint.processor_settings(
            resize="pillow" if config.resize == "pillow" else "torch",
            image_processing="device" if config.image_processing == "device" else "host",
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        # What the operator asks for may be refused, and is so before a weight is read. What the platform chooses gives
        # way to something else if it must, and is imported and checked while weights are read.
        asked = config.mm_encoder_attn_backend or config.mm_encoder_flash_attn_implementation
        self._attention = self._make_attention() if asked else None
        phases.end("attention")

    async def load(self, attention_ended: Callable[[], object] = lambda: None) -> Loaded:
        """Reads the weights and encodes one photograph. What it returns is ready.

        Args:
            attention_ended: called in a thread, after the phase in which most is imported.

        Raises:
            AttentionBackendError: nothing that the platform could choose passes its check.
            CheckpointError: a tensor is missing, surplus or of the wrong shape.
            StartupError: the photograph cannot be encoded.
        """
        # A thread of its own: it cannot be interrupted, and the loop's own threads are waited for at the end.
        thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        loop = asyncio.get_running_loop()

        def phase_ended(phase: str) -> None:
            self.phases.end(phase)
            if phase == "attention":
                attention_ended()

        in_processes = self._config.cpu_devices > 1
        devices = await loop.run_in_executor(thread, self._in_processes if in_processes else self._here, phase_ended)
        if in_processes or self._device != "cpu":
            torch.set_num_threads(1)  # a batch is packed by one thread: a team would wait for cores that others want
        thread.shutdown()
        core = self._core(devices)
        devices.call_when_lost(partial(loop.call_soon_threadsafe, core.engine.give_up, "its process ended"))
        info = devices.facts.info
        try:
            await encode_first_image(core.engine, devices.facts, len(devices.runners))
        except BaseException:
            await asyncio.to_thread(devices.close)
            raise
        logger.info("loaded %s (%s, %s on %s)", info.model, info.family, DTYPE_NAMES[info.dtype], info.device_name)
        return Loaded(devices.facts, core, devices.land_in, devices.close)

    def abandon(self) -> None:
        """Ends the processes of devices, in the midst of a load too. For a process that ends itself now."""
        if self._processes is not None:
            self._processes.kill()

    def _here(self, phase_ended: Callable[[str], None]) -> _Devices:
        """One device, of this process."""
        tower = self.load_tower(phase_ended)
        runner, max_batch_patches = self.make_runner(tower)
        facts = model_facts(tower, limits_of(self._config))
        return _Devices([runner], facts, max_batch_patches, land_in=runner.land_in)

    def _in_processes(self, phase_ended: Callable[[str], None]) -> _Devices:
        """Several, each in a process of its own."""
        from encoder_svc.server.devices.start import DeviceProcesses

        self._processes = processes = DeviceProcesses(self._config, self._model)
        try:
            info, max_batch_patches = processes.wait_until_loaded(phase_ended)
            facts = ModelFacts(info, self._settings, self._checkpoint.workflow.input_processor)
            runners = processes.open(facts, max_batch_patches)
        except BaseException:
            processes.close()
            raise
        return _Devices(
            [*runners],
            facts,
            max_batch_patches,
            call_when_lost=processes.call_when_lost,
            close=processes.close,
        )

    def load_tower(self, phase_ended: Callable[[str], None] = lambda phase: None) -> VisionTower:
        """The encoder alone, as :meth:`load` loads it.

        Args:
            phase_ended: see :func:`encoder_svc.models.tower.load_tower`.
        """
        config, merge_size = self._config, self._settings.merge_size
        graph_max_patches = config.cuda_graph_max_patches
        return load_tower(
            self._checkpoint,
            self._settings,
            lambda: self._attention or self._make_attention(),
            platform=self._platform,
            device=self._device,
            dtype=self._dtype,
            quantisation=config.quantization,
            graph_buckets=bucket_sizes(graph_max_patches, merge_size**2) if self._device.startswith("cuda") else (),
            progress=_progress_bar,
            phase_ended=phase_ended,
        )

    def _make_attention(self) -> MMEncoderAttention:
        attention = make_attention(
            self._checkpoint,
            platform=self._platform,
            dtype=self._dtype,
            override=self._config.mm_encoder_attn_backend,
            flash_attn_implementation=self._config.mm_encoder_flash_attn_implementation,
            device=self._device,
        )
        selection = attention.selection
        has_idle_pin = self._config.mm_encoder_flash_attn_implementation and selection.backend != "FLASH_ATTN"
        logger.log(
            logging.WARNING if has_idle_pin else logging.INFO,
            "attention: %s (%s %s), source=%s: %s",
            selection.backend,
            selection.implementation,
            selection.implementation_version,
            selection.source,
            selection.reason,
        )
        return attention

    def make_runner(self, tower: VisionTower) -> tuple[DeviceRunner, int]:
        """Has a tower ready for batches. Returns what runs them, and the largest, in patches."""
        config, runner = self._config, DeviceRunner(tower)
        default = _MAX_BATCH_PATCHES_ON_CPU if self._device == "cpu" else _MAX_BATCH_PATCHES
        max_batch_patches = runner.warm_up(
            graph_max_patches=config.cuda_graph_max_patches,
            memory_fraction=config.memory_fraction,
            max_batch_patches=config.max_batch_patches or default,
            phase_ended=self.phases.end,
        )
        return runner, max_batch_patches

    def _core(self, devices: _Devices) -> LocalCore:
        config = self._config
        scheduler: Scheduler[Work] = Scheduler(
            max_batch_patches=devices.max_batch_patches,
            max_batch_images=config.max_batch_images,
        )
        watch = DeviceWatch(self._metrics, num_devices=len(devices.runners))
        return LocalCore(
            engine=Engine(devices.runners, scheduler, watch=watch, watchdog_s=config.watchdog_s or math.inf),
            admission=Admission(budgets_of(config), time.monotonic),
            store=EmbeddingStore(config.cache_bytes, config.max_leased_bytes, time.monotonic),
            flights=SingleFlight(),
            promises=Promises(),
        )


def refuse_cpu_devices(device: str) -> None:
    """
    Raises:
        ConfigError: a CPU cannot be divided into several devices here.
    """
    if device != "cpu":
        raise ConfigError(f"--cpu-devices divides a CPU's cores, and the device is {device}.")
    if not hasattr(os, "memfd_create"):
        raise ConfigError("--cpu-devices needs memory that processes share, as Linux has it.")


def _progress_bar(names: Iterable[str], total: int) -> Iterable[str]:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(names, total=total, desc="loading vision tensors", unit="tensor", disable=None)
