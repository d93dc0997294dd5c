"""What callers meet: a port, health, reflection, and the servicer behind its gate."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.errors import ConfigError
from encoder_svc.server.address import listen_address, why_not
from encoder_svc.server.credentials import server_credentials
from encoder_svc.server.gate import Gate
from encoder_svc.server.handlers import add_servicer
from encoder_svc.server.servicer import EncoderServicer
from encoder_svc.server.serving import Serving

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.errors import RequestError
    from encoder_svc.observability.request import Observer
    from encoder_svc.server.pipeline import Pipeline

_SERVICE: Final = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
# Above our own limit, so that a request a little too large gets our reason and not only the transport's.
_MESSAGE_SLACK_BYTES: Final = 2**20
_INT32_MAX: Final = 2**31 - 1  # gRPC's "for ever"
# How long connections stay after the last request, so that callers read DRAINING and health watches NOT_SERVING.
_FAREWELL_S: Final = 0.5
# After so long without a call nobody is on the way.
_QUIET_S: Final = 0.1


class Front:
    """One gRPC server. Refuses with STARTING until :meth:`open`. Belongs to the event loop.

    Args:
        shares_port: other processes listen on the same port.
    """

    def __init__(self, config: Config, observer: Observer, *, shares_port: bool = False) -> None:
        self._config = config
        self._shares_port = shares_port
        self.servicer = EncoderServicer(
            Serving(
                request_window_patches=config.request_window_patches,
                send_timeout_s=config.send_timeout_s,
                lease_s=config.lease_s,
                max_lease_s=config.max_lease_s,
            ),
            observer,
        )
        self._gate = Gate(self.servicer, observer)
        self._health = health.aio.HealthServicer()
        self._serves = False
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int) -> int:
        """Listens; returns the port.

        Raises:
            ConfigError: it cannot listen there, or a certificate cannot be used.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server, bound = self._bind(port)
        await self._server.start()
        return bound

    def _bind(self, port: int) -> tuple[grpc.aio.Server, int]:
        config = self._config
        credentials = server_credentials(config)
        server = grpc.aio.server(
            interceptors=[self._gate],
            options=[
                ("grpc.max_receive_message_length", config.max_request_bytes + _MESSAGE_SLACK_BYTES),
                ("grpc.so_reuseport", int(self._shares_port)),
                ("grpc.max_connection_age_ms", _milliseconds(config.max_connection_age_s) or _INT32_MAX),
            ],
        )
        add_servicer(self.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            address = listen_address(config.host, port)
            bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(f"cannot listen on {config.host}, port {port}: {why_not(config.host, port)}.")
        return server, bound

    async def open(self, pipeline: Pipeline) -> None:
        """Begins to serve."""
        self.servicer.open(pipeline)
        self._serves = True
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def say(self, *, is_served: bool) -> None:
        """What health says between :meth:`open` and :meth:`drain`."""
        if self._serves:
            status = health_pb2.HealthCheckResponse
            await self._set_health(status.SERVING if is_served else status.NOT_SERVING)

    async def drain(self, refusal: RequestError, seconds: float, hurry: asyncio.Event) -> int:
        """Takes no new request, and lets those that run finish.

        Args:
            refusal: what new callers are told, and those that are cut short.
            seconds: until they are.
            hurry: cuts them short when it is set.

        Returns:
            How many were cut short.
        """
        self.servicer.close(refusal)
        self._serves = False
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        return await self.servicer.drain(seconds, hurry)

    async def stop(self, *, at_once: bool = False) -> None:
        """Closes the port and its connections."""
        if self._server is not None:
            if not at_once:
                await self._refuse_who_still_comes()
            await self._server.stop(None if at_once else _FAREWELL_S)

    async def _refuse_who_still_comes(self) -> None:
        """For a while: gRPC, told to stop, ends calls that come in the same moment as if their callers had gone."""
        for _ in range(round(_FAREWELL_S / _QUIET_S)):
            if time.monotonic() - self._gate.last_call_s > _QUIET_S:
                return
            await asyncio.sleep(_QUIET_S)

    async def _set_health(self, status: int) -> None:
        for service in ("", _SERVICE):
            await self._health.set(service, status)


def _milliseconds(seconds: float) -> int:
    """Whole ones, rounded up, as many as gRPC takes at most."""
    return math.ceil(min(seconds * 1e3, _INT32_MAX))
