"""The life of the server process: port, health, serving, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

from prometheus_client import disable_created_metrics

from encoder_svc.allocator import use_one_heap
from encoder_svc.config import platform_switches
from encoder_svc.errors import BrokenDeviceError, ConfigError, Reason, request_error
from encoder_svc.garbage import spare_what_is_loaded
from encoder_svc.observability.logs import configure_logs
from encoder_svc.observability.loop_lag import probe_loop_lag
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.start import StartPhases, process_age_s
from encoder_svc.observability.tracer import make_tracer
from encoder_svc.observability.web import metrics_server
from encoder_svc.platforms import platform_for_device, resolve_device
from encoder_svc.platforms.kernel_cache import use_kernel_cache
from encoder_svc.server.address import bare_host, listen_address
from encoder_svc.server.entrance import InProcess, with_front_ends
from encoder_svc.server.gauges import core_gauges
from encoder_svc.server.info import DTYPE_NAMES
from encoder_svc.server.loading import Loader
from encoder_svc.temporary import make_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder_svc._generated.encoder.v1.encoder_pb2 import GetModelInfoResponse
    from encoder_svc.config import Config, LoadedConfig
    from encoder_svc.server.entrance import Entrance
    from encoder_svc.server.loading import Loaded
    from encoder_svc.server.local_core import LocalCore

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_DEVICE_BROKEN: Final = 3
EXIT_CUT_SHORT: Final = 4
EXIT_NO_FRONT_ENDS: Final = 5
"""Exit codes: every request finished; the device is broken; requests were ended before they had finished; front ends do
not stay. A start that is refused exits with 2."""

# For batches whose callers have left, or were cut short: a device may hang in one.
_LAST_BATCHES_S: Final = 2.0

_DRAINING = request_error(Reason.DRAINING, "This replica is shutting down; try another.")
_BROKEN = request_error(Reason.DEVICE_BROKEN, "This replica's device is broken and it is shutting down; try another.")


def run_server(loaded: LoadedConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit code.

    Raises:
        StartupError: the config, the checkpoint or the attention backend cannot be served.
    """
    config = loaded.config
    use_one_heap()
    configure_logs(config.log_level, config.log_format, sys.stderr)
    # A second series beside each, which says only when it was first used.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with ExitStack() as temporary:
        # Until the loop takes over. An exception could get lost in an import or a destructor, so nothing is raised.
        def end_at_once(*_: object) -> None:
            temporary.close()
            os._exit(EXIT_OK)

        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, end_at_once)
        logger.info("configuration:\n%s", loaded.describe())
        model = _model(config, temporary)
        metrics = Metrics()
        tracer = make_tracer(config)
        phases = StartPhases(process_age_s())
        phases.end("imports")
        device = resolve_device(config.device)
        use_kernel_cache(config, platform_for_device(device, platform_switches(config)).facts, temporary)
        config = with_front_ends(config, device)
        logger.info("front ends: %d", config.frontend_processes)
        loader = Loader(config, model, metrics, phases)
        server = Server(config, loader, Observer(metrics, tracer), spare_what_is_loaded)
        code = asyncio.run(server.run())
        if tracer is not None:
            tracer.close()
    if server.has_stuck_thread:
        loader.abandon()
        os._exit(code)
    return code


class Server:
    """One server.

    Attributes:
        has_stuck_thread: a thread runs that cannot be interrupted: it reads weights, or hangs in the device.
    """

    def __init__(
        self, config: Config, loader: Loader, observer: Observer, is_loaded: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            is_loaded: called once, when all is there that stays.
        """
        self.has_stuck_thread = False
        self._is_loaded = is_loaded
        self._metrics = observer.metrics
        self._draining_since_s: float | None = None
        self._config = config
        self._loader = loader
        self._entrance = _entrance(config, observer)
        self._metrics.read_at_scrape(
            {
                "encoder_requests_running": lambda: observer.num_running,
                "encoder_ready": lambda: self._is_open,
                "encoder_draining": lambda: self._draining_since_s is not None,
                "encoder_draining_seconds": self._draining_s,
                "encoder_drain_limit_seconds": lambda: config.drain_s,
                "encoder_frontend_restarts_total": lambda: self._entrance.num_restarts,
            }
        )
        self._is_open = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """Binds the port, loads, serves, drains. Returns the exit code."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._on_signal)
        port = await self._entrance.start()
        try:
            with metrics_server(self._metrics.scraped(), bare_host(self._config.host), self._config.metrics_port):
                return await self._run(port)
        except BaseException:
            await self._entrance.stop(at_once=True)
            raise

    async def _run(self, port: int) -> int:
        try:
            loaded = await self._load()
        except BrokenDeviceError as error:
            logger.critical("%s", error)
            return await self._give_up(EXIT_DEVICE_BROKEN)
        if loaded is None:
            logger.info("stopped while loading")
            return await self._give_up(EXIT_OK)
        self._metrics.set_build_info(**_build_info(loaded.facts.info))
        self._metrics.read_at_scrape(core_gauges(loaded.core))
        self._is_loaded()
        await self._entrance.open(loaded)
        self._is_open = True
        phases = self._loader.phases
        phases.end("first_image")
        self._metrics.set_start(phases.seconds())
        logger.info("started in %s", phases.describe())
        logger.info("serving %s on %s", loaded.facts.info.model, listen_address(self._config.host, port))
        await self._until_stopped_or_broken(loaded.core)
        return await self._drain(loaded)

    async def _give_up(self, code: int) -> int:
        """Ends in the midst of a start, of which a thread still runs."""
        await self._entrance.stop(at_once=True)
        self.has_stuck_thread = True
        return code

    def _draining_s(self) -> float:
        """For how long it has been draining; 0 if it is not."""
        return 0.0 if self._draining_since_s is None else time.monotonic() - self._draining_since_s

    def _on_signal(self) -> None:
        """The first signal ends serving, the second the drain."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _load(self) -> Loaded | None:
        """The model; None if a signal came first."""
        prepare = partial(asyncio.get_running_loop().call_soon_threadsafe, self._entrance.prepare)
        loading = asyncio.create_task(self._loader.load(prepare))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return loading.result() if loading.done() else None

    async def _until_stopped_or_broken(self, core: LocalCore) -> None:
        background = [
            asyncio.create_task(core.expire_leases()),
            asyncio.create_task(probe_loop_lag(self._metrics)),
        ]
        ends = [
            asyncio.create_task(self._stop.wait()),
            asyncio.create_task(core.engine.broken.wait()),
            asyncio.create_task(self._entrance.until_failed()),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (*background, *ends):
            task.cancel()

    async def _drain(self, loaded: Loaded) -> int:
        """Lets running requests finish. Returns the exit code."""
        engine = loaded.core.engine
        self._stop.set()
        self._is_open = False
        self._draining_since_s = time.monotonic()
        logger.info("draining for up to %g s; a second signal ends it", self._config.drain_s)
        num_cut_short = await self._entrance.drain(_BROKEN if engine.broken.is_set() else _DRAINING, self._hurry)
        await self._entrance.stop()
        try:
            await asyncio.wait_for(engine.aclose(), _LAST_BATCHES_S)
        except TimeoutError:
            logger.warning("leaves batches to a device that nobody waits for any more")
            self.has_stuck_thread = True
        broken = engine.broken.is_set()  # it may have come to that only now
        await asyncio.to_thread(loaded.close)
        if num_cut_short:
            logger.warning("ended %d requests that had not finished", num_cut_short)
        logger.info("stopped")
        self.has_stuck_thread |= broken
        if broken:
            return EXIT_DEVICE_BROKEN
        if self._entrance.has_failed:
            return EXIT_NO_FRONT_ENDS
        return EXIT_CUT_SHORT if num_cut_short else EXIT_OK


def _entrance(config: Config, observer: Observer) -> Entrance:
    if not config.frontend_processes:
        return InProcess(config, observer)
    if not hasattr(os, "memfd_create"):
        raise ConfigError("--frontend-processes needs memory that processes share, as Linux has it.")
    from encoder_svc.server.frontends.supervisor import FrontEnds

    return FrontEnds(config, observer)


def _build_info(info: GetModelInfoResponse) -> dict[str, str]:
    return {
        "version": info.server_version,
        "model": info.model,
        "revision": info.revision,
        "platform": info.platform,
        "device": info.device_name,
        "dtype": DTYPE_NAMES[info.dtype],
        "attn_backend": info.attention.backend,
        "attn_implementation": info.attention.implementation,
        "attn_source": info.attention.source,
    }


def _model(config: Config, temporary: ExitStack) -> str:
    """The model to serve: the operator's, or else a tiny one made for this process, which goes with ``temporary``."""
    if config.model is not None:
        return config.model
    if config.revision is not None:
        raise ConfigError(f"--revision {config.revision}: is for hub ids, and there is no --model.")
    from encoder_svc.models.synthetic import make_checkpoint

    model = make_folder(temporary, "encoder-svc-") / "tiny-qwen2_5_vl"
    make_checkpoint(model, family="qwen2_5_vl", vision_only=True)
    logger.warning(
        "NO --model WAS GIVEN. Serving a tiny qwen2_5_vl with RANDOM weights, made just now: its embeddings mean "
        "nothing. Name a checkpoint with --model to serve a real one."
    )
    return str(model)
