"""HTTP on the metrics port: ``/metrics`` for Prometheus, ``/`` for people. Reads only, from few callers at a time."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from encoder_svc.errors import ConfigError
from encoder_svc.observability.page import status_page

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.registry import Collector

    Request = socket.socket | tuple[bytes, socket.socket]

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 16
_TIMEOUT_S: Final = 10.0
# How long the end of a server waits for this one to notice.
_POLL_S: Final = 0.05


@contextmanager
def metrics_server(registry: Collector, host: str, port: int | None) -> Iterator[None]:
    """Serves ``/metrics`` and the status page on ``host`` while inside; nothing if ``port`` is None.

    Raises:
        ConfigError: the port is taken, or the host is none of this machine's.
    """
    if port is None:
        yield
        return
    try:
        server = _Server(host, port, _application(registry))
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host} ({error.strerror}).") from None
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
    thread.start()
    address = f"[{host}]" if ":" in host.strip("[]") else host
    logger.info("metrics and the status page: http://%s:%d/", address, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _application(registry: Collector) -> WSGIApplication:
    metrics = make_wsgi_app(registry)
    page, policy = status_page()
    page_headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-cache"),
    ]

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _text(start_response, "405 Method Not Allowed", ("Allow", "GET, HEAD"))
        match environ["PATH_INFO"]:
            case "/metrics":
                body = metrics({**environ, "REQUEST_METHOD": "GET"}, start_response)
            case "/":
                start_response("200 OK", page_headers)
                body = [page]
            case _:
                body = _text(start_response, "404 Not Found")
        return body if method == "GET" else [b""]

    return application


def _text(start_response: StartResponse, status: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{status}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection; those beyond ``_MAX_CONNECTIONS`` are closed at once."""

    daemon_threads = True

    def __init__(self, host: str, port: int, application: WSGIApplication) -> None:
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self.address_family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__((str(address[0]), port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Binds without the base class's look-up of the host's name, which can wait for a DNS server for seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Request, client_address: object) -> None:
        """Takes a connection if there is room."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._room.release()
            raise

    def process_request_thread(self, request: Request, client_address: object) -> None:
        """Serves one connection and leaves its room to the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Request, client_address: object) -> None:
        """A caller that left, or was too slow, is no matter for the server's log."""
        logger.debug("a connection to the metrics port ended early", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Nothing: scrapes come every few seconds."""
