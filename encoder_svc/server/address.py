"""Where a server listens, and why it cannot."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from encoder_svc.errors import ConfigError


def bare_host(host: str) -> str:
    """An IPv6 address without the brackets in which it may be given; any other host as it is."""
    return host.removeprefix("[").removesuffix("]")


def listen_address(host: str, port: int) -> str:
    """``host:port`` as gRPC reads it; an IPv6 address in brackets.

    Raises:
        ConfigError: not a host.
    """
    if "/" in host or host.startswith("unix:"):
        raise ConfigError(f"--host {host}: name a host or an address, such as 127.0.0.1, 0.0.0.0 or ::1.")
    bare = bare_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def why_not(host: str, port: int) -> str:
    """What keeps a server from listening there."""
    return _refusal(host, port) or "the port is taken"


def _refusal(host: str, port: int) -> str | None:
    """What the system says of it, found by trying with a plain socket; None if it takes it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind(address)
    except socket.gaierror:
        return "the host is not known"
    except OSError as error:
        known = {
            errno.EADDRINUSE: "the port is taken",
            errno.EADDRNOTAVAIL: "that is not an address of this machine",
            errno.EACCES: "this user may not listen on that port",
        }
        return known.get(error.errno or 0, error.strerror or "unknown")
    return None


@dataclass(frozen=True, slots=True)
class HeldPort:
    """A port that is one server's, until it is closed."""

    number: int
    _sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        """Leaves it to others."""
        for held in self._sockets:
            held.close()


def hold_port(host: str, port: int) -> HeldPort:
    """Takes a port for processes that share it (``SO_REUSEPORT``), without listening on it. 0 for any that is free.

    Raises:
        ConfigError: it cannot be had for ourselves alone.
    """
    listen_address(host, port)
    with ExitStack() as unless_held:
        sockets = [unless_held.enter_context(_claim(host, port))] if port else []
        sockets.append(unless_held.enter_context(_bound(host, port)))
        unless_held.pop_all()
    return HeldPort(sockets[-1].getsockname()[1], tuple(sockets))


def _bound(host: str, port: int) -> socket.socket:
    """To a port that others may share."""
    if port and (reason := _refusal(host, port)):
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}.")
    family, kind, _, _, address = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held


def _claim(host: str, port: int) -> socket.socket:
    """Keeps another server of ours from sharing the port too: until somebody listens, the system lets it. By a name
    that ends with the process that has it.

    Source: unix(7), "Abstract sockets".

    Raises:
        ConfigError: it has it already.
    """
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0encoder-svc {port} {bare_host(host)[:80]}")
    except OSError:
        claim.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: the port is taken.") from None
    return claim
