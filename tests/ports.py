"""Ports for servers that tests start."""

from __future__ import annotations

import socket
from random import SystemRandom

# Below those that Linux gives to whoever connects or asks for any: one of these is nobody's until it is listened on.
_FIRST, _LAST = 20_000, 32_767


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    while True:
        with socket.socket() as listening:
            try:
                listening.bind(("127.0.0.1", port := SystemRandom().randint(_FIRST, _LAST)))
            except OSError:
                continue
            return port
