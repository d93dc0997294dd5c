"""The life of the server process: port, health, serving, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import disable_created_metrics

from encoder_svc import __version__
from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.config import platform_switches, tracing_variables
from encoder_svc.errors import ConfigError, Reason, request_error
from encoder_svc.observability.logs import configure_logs
from encoder_svc.observability.loop_lag import probe_loop_lag
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.observability.start import StartPhases, process_age_s
from encoder_svc.observability.web import metrics_server
from encoder_svc.platforms import platform_for_device, resolve_device
from encoder_svc.platforms.kernel_cache import use_kernel_cache
from encoder_svc.server.address import bare_host, listen_address, why_not
from encoder_svc.server.allocator import use_one_heap
from encoder_svc.server.credentials import server_credentials
from encoder_svc.server.gate import Gate
from encoder_svc.server.gauges import pipeline_gauges
from encoder_svc.server.handlers import add_servicer
from encoder_svc.server.loading import Loader
from encoder_svc.server.servicer import EncoderServicer, Serving

if TYPE_CHECKING:
    from encoder_svc.config import Config, LoadedConfig
    from encoder_svc.models.tower import VisionTower
    from encoder_svc.observability.tracing import OpenTelemetryTracer
    from encoder_svc.server.pipeline import Pipeline

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_DEVICE_BROKEN: Final = 3
EXIT_CUT_SHORT: Final = 4
"""Exit codes: every request finished; the device is broken; requests were ended before they had finished. A start that
is refused exits with 2."""

_DRAINING = request_error(Reason.DRAINING, "This replica is shutting down; try another.")
_BROKEN = request_error(Reason.DEVICE_BROKEN, "This replica's device is broken and it is shutting down; try another.")

_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
# Above our own limit, so that a request a little too large gets our reason and not only the transport's.
_MESSAGE_SLACK_BYTES = 2**20
_INT32_MAX = 2**31 - 1  # gRPC's "for ever"
# How long connections stay after the last request, so that callers read DRAINING and health watches NOT_SERVING.
_FAREWELL_S = 0.5


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
        tracer = _tracer() if config.tracing else None
        phases = StartPhases(process_age_s())
        phases.end("imports")
        platform = platform_for_device(resolve_device(config.device), platform_switches(config))
        use_kernel_cache(config, platform.facts, temporary)
        server = Server(config, Loader(config, model, metrics, phases), Observer(metrics, tracer))
        code = asyncio.run(server.run())
        if tracer is not None:
            tracer.close()
    if server.has_stuck_thread:
        os._exit(code)
    return code


class Server:
    """One server process.

    Attributes:
        has_stuck_thread: a thread runs that cannot be interrupted: it reads weights, or hangs in the device.
    """

    def __init__(self, config: Config, loader: Loader, observer: Observer) -> None:
        self.has_stuck_thread = False
        self._observer = observer
        self._metrics = observer.metrics
        self._draining_since_s: float | None = None
        self._config = config
        self._loader = loader
        self._servicer = EncoderServicer(
            Serving(
                request_window_patches=config.request_window_patches,
                send_timeout_s=config.send_timeout_s,
                lease_s=config.lease_s,
                max_lease_s=config.max_lease_s,
            ),
            observer,
        )
        self._metrics.read_at_scrape(
            {
                "encoder_requests_running": lambda: observer.num_running,
                "encoder_ready": lambda: self._servicer.is_open,
                "encoder_draining": lambda: self._draining_since_s is not None,
                "encoder_draining_seconds": self._draining_s,
                "encoder_drain_limit_seconds": lambda: config.drain_s,
            }
        )
        self._health = health.aio.HealthServicer()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """Binds the port, loads, serves, drains. Returns the exit code."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._on_signal)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        server, port = self._bind()
        with metrics_server(self._metrics.registry, bare_host(self._config.host), self._config.metrics_port):
            return await self._run(server, port)

    async def _run(self, server: grpc.aio.Server, port: int) -> int:
        await server.start()
        try:
            pipeline = await self._load()
        except BaseException:
            await server.stop(None)
            raise
        if pipeline is None:
            logger.info("stopped while loading")
            await server.stop(None)
            self.has_stuck_thread = True
            return EXIT_OK
        self._metrics.set_build_info(**_build_info(pipeline.tower))
        self._metrics.read_at_scrape(pipeline_gauges(pipeline))
        self._servicer.open(pipeline)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        phases = self._loader.phases
        phases.end("first_image")
        self._metrics.set_start(phases.seconds())
        logger.info("started in %s", phases.describe())
        logger.info("serving %s on %s:%d", pipeline.tower.model, self._config.host, port)
        await self._until_stopped_or_broken(pipeline)
        return await self._drain(server, pipeline)

    def _draining_s(self) -> float:
        """For how long it has been draining; 0 if it is not."""
        return 0.0 if self._draining_since_s is None else time.monotonic() - self._draining_since_s

    def _on_signal(self) -> None:
        """The first signal ends serving, the second the drain."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _bind(self) -> tuple[grpc.aio.Server, int]:
        host, port = self._config.host, self._config.port
        credentials = server_credentials(self._config)
        server = grpc.aio.server(
            interceptors=[Gate(self._servicer, self._observer)],
            options=[
                ("grpc.max_receive_message_length", self._loader.limits.max_request_bytes + _MESSAGE_SLACK_BYTES),
                ("grpc.so_reuseport", 0),
                (
                    "grpc.max_connection_age_ms",
                    min(round(self._config.max_connection_age_s * 1e3), _INT32_MAX) or _INT32_MAX,
                ),
            ],
        )
        add_servicer(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            address = listen_address(host, port)
            bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(f"cannot listen on {host}, port {port}: {why_not(host, port)}.")
        return server, bound

    async def _load(self) -> Pipeline | None:
        """The pipeline; None if a signal came first."""
        loading = asyncio.create_task(self._loader.load())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return loading.result() if loading.done() else None

    async def _until_stopped_or_broken(self, pipeline: Pipeline) -> None:
        background = [
            asyncio.create_task(pipeline.expire_leases()),
            asyncio.create_task(probe_loop_lag(self._metrics)),
        ]
        ends = [asyncio.create_task(self._stop.wait()), asyncio.create_task(pipeline.engine.broken.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (*background, *ends):
            task.cancel()

    async def _drain(self, server: grpc.aio.Server, pipeline: Pipeline) -> int:
        """Lets running requests finish. Returns the exit code."""
        broken = pipeline.engine.broken.is_set()
        self._stop.set()
        self._draining_since_s = time.monotonic()
        logger.info("draining for up to %g s; a second signal ends it", self._config.drain_s)
        self._servicer.close(_BROKEN if broken else _DRAINING)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        num_cut_short = await self._servicer.drain(self._config.drain_s, self._hurry)
        await server.stop(_FAREWELL_S)
        await pipeline.aclose()
        if num_cut_short:
            logger.warning("ended %d requests that had not finished", num_cut_short)
        logger.info("stopped")
        self.has_stuck_thread = broken
        if broken:
            return EXIT_DEVICE_BROKEN
        return EXIT_CUT_SHORT if num_cut_short else EXIT_OK

    async def _set_health(self, status: int) -> None:
        for service in ("", _SERVICE):
            await self._health.set(service, status)


def _tracer() -> OpenTelemetryTracer:
    """
    Raises:
        ConfigError: OpenTelemetry is not installed, or not the exporter that its variables name.
    """
    try:
        from encoder_svc.observability.tracing import OpenTelemetryTracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tracing: needs the package {error.name}: pip install 'encoder-svc[tracing]' — or, from a clone, "
            "pip install -e '.[tracing]'."
        ) from None
    return OpenTelemetryTracer(tracing_variables())


def _build_info(tower: VisionTower) -> dict[str, str]:
    return {
        "version": __version__,
        "model": tower.model,
        "revision": tower.revision,
        "platform": tower.platform.name,
        "device": tower.platform.device_name(),
        "dtype": tower.dtype,
        "attn_backend": tower.selection.backend,
        "attn_implementation": tower.selection.implementation,
        "attn_source": tower.selection.source,
    }


def _model(config: Config, temporary: ExitStack) -> str:
    """The model to serve: the operator's, or else a tiny one made for this process, which goes with ``temporary``."""
    if config.model is not None:
        return config.model
    from encoder_svc.models.synthetic import make_checkpoint

    folder = temporary.enter_context(tempfile.TemporaryDirectory(prefix="encoder-svc-"))
    model = Path(folder) / "tiny-qwen2_5_vl"
    make_checkpoint(model, family="qwen2_5_vl", vision_only=True)
    logger.warning(
        "NO --model WAS GIVEN. Serving a tiny qwen2_5_vl with RANDOM weights, made just now: its embeddings mean "
        "nothing. Name a checkpoint with --model to serve a real one."
    )
    return str(model)
