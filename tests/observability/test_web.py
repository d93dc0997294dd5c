"""The metrics port, as HTTP callers find it."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from encoder_svc.errors import ConfigError
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.web import metrics_server
from tests.tools import require_ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CONNECTIONS = 16


@pytest.fixture
def serving(port: int) -> Iterator[int]:
    with metrics_server(Metrics().registry, "127.0.0.1", port):
        yield port


def answer(port: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def wait_for_room(port: int) -> None:
    """Returns once a request is answered; the server counts a connection as gone a moment after its caller does."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            assert answer(port, "GET", "/metrics")[0] == 200
        except (http.client.RemoteDisconnected, ConnectionResetError):
            assert time.monotonic() < deadline_s, "no room although a caller left"
            time.sleep(0.02)
        else:
            return


def test_a_head_request_gets_the_headers_alone(serving: int) -> None:
    status, headers, body = answer(serving, "HEAD", "/metrics")
    assert (status, body) == (200, b"")
    assert headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(serving: int, method: str) -> None:
    status, headers, _ = answer(serving, method, "/metrics")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_other_paths_are_not_found(serving: int) -> None:
    assert answer(serving, "GET", "/etc/passwd")[0] == 404


def test_the_page_is_one_document_that_may_run_its_own_script_and_ask_its_own_server(serving: int) -> None:
    status, headers, body = answer(serving, "GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(directive.split(" ", 1) for directive in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.findall(rb"""(?:src|href)=["'](?!data:|metrics)""", body) == []


def test_callers_beyond_the_bound_are_turned_away_until_one_leaves(serving: int) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", serving))) for _ in range(MAX_CONNECTIONS)]
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            answer(serving, "GET", "/metrics")
        idle[0].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert idle[0].makefile("rb").read().startswith(b"HTTP/1.0 200")
        wait_for_room(serving)


def test_connections_that_no_thread_could_be_started_for_leave_their_room(
    serving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", refuse)
        for _ in range(MAX_CONNECTIONS):
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                answer(serving, "GET", "/metrics")
    assert answer(serving, "GET", "/metrics")[0] == 200


def test_a_port_that_is_taken_is_refused(serving: int) -> None:
    with (
        pytest.raises(ConfigError, match="cannot listen"),
        metrics_server(Metrics().registry, "127.0.0.1", serving),
    ):
        pass


def test_it_listens_on_ipv6_where_asked(port: int) -> None:
    require_ipv6()
    with (
        metrics_server(Metrics().registry, "::1", port),
        socket.create_connection(("::1", port), timeout=10) as connection,
    ):
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.0 200"


def test_without_a_port_nothing_listens(port: int) -> None:
    with metrics_server(Metrics().registry, "127.0.0.1", None), socket.socket() as trying:
        assert trying.connect_ex(("127.0.0.1", port)) != 0


def test_the_log_says_where_it_listens_also_where_the_port_is_any(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), metrics_server(Metrics().registry, "127.0.0.1", 0):
        said = re.search(r"http://127\.0\.0\.1:(\d+)/$", caplog.text.strip())
        assert said
        assert answer(int(said[1]), "GET", "/metrics")[0] == 200
