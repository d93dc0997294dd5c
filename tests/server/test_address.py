"""A port that processes of one server share, and no other server."""

from __future__ import annotations

import socket

import pytest

from encoder_svc.errors import ConfigError
from encoder_svc.server.address import hold_port
from tests.ports import free_port


def test_a_port_is_held_by_one_server_though_nobody_listens_yet() -> None:
    port = free_port()
    held = hold_port("127.0.0.1", port)
    assert held.number == port
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: the port is taken"):
        hold_port("127.0.0.1", port)
    held.close()
    hold_port("127.0.0.1", port).close()


def test_one_that_somebody_listens_on_is_taken_and_no_claim_to_it_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="the port is taken"):
            hold_port("127.0.0.1", port)
    hold_port("127.0.0.1", port).close()


def test_any_free_port_differs_from_the_one_before() -> None:
    first, second = hold_port("127.0.0.1", 0), hold_port("127.0.0.1", 0)
    assert first.number != second.number
    first.close()
    second.close()
