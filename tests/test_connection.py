"""The flags by which a command reaches a server."""

from __future__ import annotations

import argparse

import pytest

from encoder_svc.config import Config
from encoder_svc.connection import add_connection_arguments, connection, local_connection
from encoder_svc.errors import ConfigError


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    return parser.parse_args(flags)


def test_without_flags_the_connection_is_in_the_clear() -> None:
    assert connection(parse()).credentials is None
    assert connection(parse()).target == "127.0.0.1:50051"


def test_tls_alone_trusts_what_grpc_trusts() -> None:
    assert connection(parse("--tls")).credentials is not None


def test_a_name_for_the_certificate_turns_tls_on() -> None:
    server = connection(parse("--tls-server-name", "encoder-svc"))
    assert server.credentials is not None
    assert server.options == (("grpc.ssl_target_name_override", "encoder-svc"),)


def test_a_certificate_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key go together"):
        connection(parse("--tls-cert", "x"))


@pytest.mark.parametrize(
    ("host", "target"),
    [("127.0.0.1", "127.0.0.1:7"), ("0.0.0.0", "127.0.0.1:7"), ("::", "[::1]:7"), ("[::]", "[::1]:7"), ("h", "h:7")],
)
def test_a_server_on_every_address_is_asked_on_loopback(host: str, target: str) -> None:
    assert local_connection(Config(host=host, port=7), parse()).target == target


def test_a_port_that_the_server_picks_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--target"):
        local_connection(Config(port=0), parse())
