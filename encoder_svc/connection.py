"""How a command reaches a server: the flags ``--target`` and ``--tls-…``, and the channel that they ask for.

Light at import: the parser of every command passes here.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    import grpc

    from encoder_svc.config import Config

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not listened on


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """Where a server is and how it is spoken to.

    Attributes:
        target: ``host:port``, or any name that gRPC resolves.
        credentials: None for a connection in the clear.
        options: gRPC's channel arguments.
    """

    target: str
    credentials: grpc.ChannelCredentials | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def channel(self) -> grpc.Channel:
        import grpc

        if self.credentials is None:
            return grpc.insecure_channel(self.target, options=self.options)
        return grpc.secure_channel(self.target, self.credentials, options=self.options)


def add_connection_arguments(
    parser: argparse.ArgumentParser,
    *,
    target: str | None = "127.0.0.1:50051",
    target_help: str = "server (default: %(default)s)",
    timeout_s: float = 60.0,
) -> None:
    """Adds ``--target``, ``--timeout-s`` and the flags of TLS."""
    parser.add_argument("--target", type=_target, default=target, metavar="HOST:PORT", help=target_help)
    parser.add_argument(
        "--timeout-s",
        type=_timeout_s,
        default=timeout_s,
        metavar="SECONDS",
        help="for the whole call; inf waits without end (default: %(default)s)",
    )
    tls = parser.add_argument_group("TLS", "any of these turns it on; without them the connection is in the clear")
    tls.add_argument("--tls", action="store_true", help="trust the authorities that gRPC trusts by default")
    tls.add_argument("--tls-ca", metavar="FILE", help="trust these instead: PEM certificates")
    tls.add_argument("--tls-cert", metavar="FILE", help="who we are, for a server that asks: PEM, with its chain")
    tls.add_argument("--tls-key", metavar="FILE", help="the private key of --tls-cert, PEM")
    tls.add_argument("--tls-server-name", metavar="NAME", help="the name that the server's certificate is for")


def connection(parsed: argparse.Namespace) -> Connection:
    """What the flags ask for.

    Raises:
        ConfigError: a file is missing or wrong, or one of certificate and key is not named.
    """
    return _by_flags(parsed.target, parsed)


def local_connection(config: Config, parsed: argparse.Namespace) -> Connection:
    """How a server of this machine with this config is reached: by the flags of TLS, or else by the server's own files.

    Of the latter the certificate is what is trusted, and where callers must show one, what is shown.

    Raises:
        ConfigError: its port is picked at its start, or its files are missing or wrong.
    """
    if config.port == 0:
        raise ConfigError("the server's port is 0, so that it picks one; name the one it printed with --target.")
    host = config.host.removeprefix("[").removesuffix("]")
    host = _LOOPBACK.get(host, host)
    target = f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"
    if config.tls_cert is None or _uses_tls(parsed):
        return _by_flags(target, parsed)
    own = (config.tls_cert, config.tls_key) if config.tls_client_ca else (None, None)
    return Connection(target=target, credentials=_credentials(config.tls_cert, *own))


def _by_flags(target: str, parsed: argparse.Namespace) -> Connection:
    if not _uses_tls(parsed):
        return Connection(target=target)
    options = (("grpc.ssl_target_name_override", parsed.tls_server_name),) if parsed.tls_server_name else ()
    credentials = _credentials(parsed.tls_ca, parsed.tls_cert, parsed.tls_key)
    return Connection(target=target, credentials=credentials, options=options)


def _uses_tls(parsed: argparse.Namespace) -> bool:
    return bool(parsed.tls or parsed.tls_ca or parsed.tls_cert or parsed.tls_key or parsed.tls_server_name)


def _credentials(ca: str | None, cert: str | None, key: str | None) -> grpc.ChannelCredentials:
    import grpc

    from encoder_svc.tls import read_authorities, read_identity

    if (cert is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key go together.")
    authorities = None if ca is None else read_authorities(ca, "--tls-ca")
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(authorities)
    identity = read_identity(cert, key)
    return grpc.ssl_channel_credentials(authorities, identity.key, identity.chain)


def _target(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give HOST:PORT, such as 127.0.0.1:50051.")
    return text


def _timeout_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}.")
    return seconds
