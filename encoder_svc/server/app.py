"""Start-up, serving and drain of the server process."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import math
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.cache.keys import ContentKeys
from encoder_svc.cache.promises import Promises
from encoder_svc.cache.single_flight import SingleFlight
from encoder_svc.cache.store import EmbeddingStore
from encoder_svc.config import platform_switches
from encoder_svc.engine.admission import Admission, Budgets
from encoder_svc.engine.engine import Engine, Work
from encoder_svc.engine.runner import DeviceRunner
from encoder_svc.engine.scheduler import Scheduler
from encoder_svc.errors import ConfigError, Reason, request_error
from encoder_svc.images.limits import Limits
from encoder_svc.images.processor import ImageProcessor
from encoder_svc.images.types import EncodedImageBytes
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import VisionTower, load_tower, make_attention
from encoder_svc.platforms import Platform, platform_for_device, resolve_device
from encoder_svc.server.allocator import use_one_heap
from encoder_svc.server.pipeline import Pipeline
from encoder_svc.server.servicer import EncoderServicer, Serving

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.config import Config, LoadedConfig
    from encoder_svc.images.processor import ProcessorSettings

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_DEVICE_BROKEN = 3
EXIT_CUT_SHORT = 4
"""Exit codes: all requests finished; the device is broken; requests were ended after drain_s. 2 is a refused start."""

_DRAINING = request_error(Reason.DRAINING, "This replica is shutting down; try another.")
_BROKEN = request_error(Reason.DEVICE_BROKEN, "This replica's device is broken and it is shutting down; try another.")

_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
# Above our own limit, so that a request a little too large gets our reason and not only the transport's.
_MESSAGE_SLACK_BYTES = 2**20


def run_server(loaded: LoadedConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit code.

    Raises:
        StartupError: the config, the checkpoint or the attention backend cannot be served.
    """
    config = loaded.config
    use_one_heap()
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logger.info("configuration:\n%s", loaded.describe())
    with _model_folder(config) as model:
        return asyncio.run(Server(config, model).run())


class Server:
    """One server process: what it has decided before any weight is read, then its life."""

    def __init__(self, config: Config, model: str) -> None:
        """
        Raises:
            StartupError: see :func:`run_server`. Reads configs and no weights, so it is quick to refuse.
        """
        self._config = config
        self._limits = Limits(
            max_image_bytes=config.max_image_bytes,
            max_request_bytes=config.max_request_bytes,
            max_image_side=config.max_image_side,
            max_image_pixels=config.max_image_pixels,
            max_images=config.max_images,
            max_request_patches=config.max_request_patches,
        )
        self._device = resolve_device(config.device)
        self._platform: Platform = platform_for_device(self._device, platform_switches(config))
        self._dtype = self._platform.default_dtype() if config.dtype == "auto" else config.dtype
        self._checkpoint = Checkpoint(model, revision=config.revision)
        self._attention: MMEncoderAttention = make_attention(
            self._checkpoint,
            platform=self._platform,
            dtype=self._dtype,
            override=config.mm_encoder_attn_backend,
            flash_attn_implementation=config.mm_encoder_flash_attn_implementation,
            device=self._device,
        )
        self._settings: ProcessorSettings = self._checkpoint.processor_settings(
            resize="pillow" if config.resize == "pillow" else "torch",
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        selection = self._attention.selection
        logger.info(
            "attention: %s (%s %s), source=%s: %s",
            selection.backend,
            selection.implementation,
            selection.implementation_version,
            selection.source,
            selection.reason,
        )
        self._servicer = EncoderServicer(
            Serving(
                request_window_patches=config.request_window_patches,
                send_timeout_s=config.send_timeout_s,
                lease_s=config.lease_s,
                max_lease_s=config.max_lease_s,
            )
        )
        self._health = health.aio.HealthServicer()

    async def run(self) -> int:
        """Binds the port, loads, serves, drains. Returns the exit code."""
        stop = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        server, port = self._bind()
        await server.start()
        stopping = asyncio.create_task(stop.wait())
        loading = asyncio.create_task(self._load())
        await asyncio.wait([stopping, loading], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # A thread that reads weights cannot be interrupted, and nothing it does needs an orderly end.
            logger.info("stopped while loading")
            await server.stop(None)
            os._exit(0)
        try:
            pipeline = loading.result()
        except BaseException:
            await server.stop(None)
            raise
        self._servicer.open(pipeline)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving %s on %s:%d", pipeline.tower.model, self._config.host, port)
        expiring = asyncio.create_task(pipeline.expire_leases())
        breaking = asyncio.create_task(pipeline.engine.broken.wait())
        await asyncio.wait([stopping, breaking], return_when=asyncio.FIRST_COMPLETED)
        expiring.cancel()
        return await self._drain(server, pipeline)

    def _bind(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._limits.max_request_bytes + _MESSAGE_SLACK_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        encoder_pb2_grpc.add_EncoderServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        address = f"{self._config.host}:{self._config.port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: the port is taken or the host is not this machine's.")
        return server, port

    async def _load(self) -> Pipeline:
        """Reads the weights and encodes one photograph. Only then is the server ready."""
        started_s = time.perf_counter()
        tower = await asyncio.to_thread(self._load_tower)
        loaded_s = time.perf_counter()
        pipeline = self._pipeline(tower)
        photograph = importlib.resources.files("encoder_svc.server").joinpath("warmup.jpg").read_bytes()
        plan = pipeline.processor.plan(EncodedImageBytes(photograph))
        await pipeline.engine.encode(await asyncio.to_thread(plan.process))
        logger.info(
            "loaded %s (%s, %s on %s) in %.2f s, first image in %.2f s",
            tower.model,
            tower.family,
            tower.dtype,
            self._platform.device_name(),
            loaded_s - started_s,
            time.perf_counter() - loaded_s,
        )
        return pipeline

    def _pipeline(self, tower: VisionTower) -> Pipeline:
        config = self._config
        scheduler: Scheduler[Work] = Scheduler(
            max_batch_patches=config.max_batch_patches, max_batch_images=config.max_batch_images
        )
        budgets = Budgets(
            max_queued_patches=config.max_queued_patches,
            max_inflight_images=config.max_inflight_images,
            max_inflight_bytes=config.max_inflight_bytes,
        )
        return Pipeline(
            tower=tower,
            processor=ImageProcessor(self._settings, self._limits),
            keys=ContentKeys(tower.config_hash, self._settings.hash()),
            engine=Engine(DeviceRunner(tower), scheduler, watchdog_s=config.watchdog_s or math.inf),
            admission=Admission(budgets, time.monotonic),
            store=EmbeddingStore(config.cache_bytes, config.max_leased_bytes, time.monotonic),
            flights=SingleFlight(),
            promises=Promises(),
            header_thread=ThreadPoolExecutor(1, thread_name_prefix="header"),
            image_threads=ThreadPoolExecutor(config.decode_threads, thread_name_prefix="image"),
            decodes_per_request=config.decode_threads,
        )

    def _load_tower(self) -> VisionTower:
        return load_tower(
            self._checkpoint,
            self._settings,
            self._attention,
            platform=self._platform,
            device=self._device,
            dtype=self._dtype,
            progress=_progress_bar,
        )

    async def _drain(self, server: grpc.aio.Server, pipeline: Pipeline) -> int:
        """Lets running requests finish. Returns the exit code."""
        broken = pipeline.engine.broken.is_set()
        logger.info("draining for up to %g s", self._config.drain_s)
        self._servicer.close(_BROKEN if broken else _DRAINING)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        num_cut_short = await self._servicer.drain(self._config.drain_s)
        await server.stop(1.0)
        await pipeline.aclose()
        if num_cut_short:
            logger.warning("ended %d requests that had not finished", num_cut_short)
        logger.info("stopped")
        if broken:
            # A thread that hangs in the device cannot be joined.
            os._exit(EXIT_DEVICE_BROKEN)
        return EXIT_CUT_SHORT if num_cut_short else EXIT_OK

    async def _set_health(self, status: int) -> None:
        for service in ("", _SERVICE):
            await self._health.set(service, status)


@contextmanager
def _model_folder(config: Config) -> Iterator[str]:
    """The model to serve: the operator's, or else a tiny one made for this process."""
    if config.model is not None:
        yield config.model
        return
    from encoder_svc.models.synthetic import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="encoder-svc-") as folder:
        model = Path(folder) / "tiny-qwen2_5_vl"
        make_checkpoint(model, family="qwen2_5_vl", vision_only=True)
        logger.warning(
            "NO --model WAS GIVEN. Serving a tiny qwen2_5_vl with RANDOM weights, made just now: its embeddings mean "
            "nothing. Name a checkpoint with --model to serve a real one."
        )
        yield str(model)


def _progress_bar(names: Iterable[str], total: int) -> Iterable[str]:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(names, total=total, desc="loading vision tensors", unit="tensor", disable=None)
