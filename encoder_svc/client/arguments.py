"""A caller's arguments, checked before anything is sent. Images are :mod:`~encoder_svc.client.request`'s."""

from __future__ import annotations

from collections.abc import Sized
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN_CONNECTIONS = ("grpc.use_local_subchannel_pool", 1)
_LONGEST_TIMEOUT_S = 1e9  # some way beyond gRPC's clock runs over, and calls end at once
_NO_TIME_S = -1.0  # gRPC rounds a deadline up, so that with 0 a fast answer would still come


def checked_target(target: str) -> str:
    """
    Raises:
        TypeError: it is not a text.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be a text such as host:port, not {type(target).__name__}.")
    return target


def checked_timeout(timeout_s: float | None) -> float | None:
    """
    Raises:
        TypeError, ValueError: it is no number, or a negative one.
    """
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, Real):
        raise TypeError(f"timeout_s must be a number of seconds, or None, not {type(timeout_s).__name__}.")
    if not timeout_s >= 0:
        raise ValueError(f"timeout_s must be 0 or more seconds, or None, not {timeout_s}.")
    return timeout_s


def checked_lease(lease_s: float) -> float:
    """
    Raises:
        TypeError: it is no number. Whether it is within bounds is the server's to say.
    """
    if not isinstance(lease_s, Real):
        raise TypeError(
            f"lease_s must be a number of seconds, 0 for the server's default, not {type(lease_s).__name__}."
        )
    return lease_s


def call_timeout(own_s: float | None, clients_s: float | None) -> float | None:
    """What gRPC is told: the call's own timeout, else the client's. None and infinity wait without end.

    Raises:
        TypeError, ValueError: the call's own is no number, or a negative one.
    """
    timeout_s = clients_s if own_s is None else checked_timeout(own_s)
    if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S:
        return None
    return timeout_s or _NO_TIME_S


def checked_keys(keys: Sequence[str]) -> Sequence[str]:
    """
    Raises:
        TypeError: it is one key (which would be taken for a list of characters), no list, or a list of something else.
        ValueError: a key holds a lone surrogate.
    """
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sized):
        raise TypeError(f"keys must be a list of keys, not {type(keys).__name__}; put a single one in a list.")
    return [_checked_text(key, "a key") for key in keys]


def checked_request_id(request_id: str) -> str:
    """
    Raises:
        TypeError: it is not a text.
        ValueError: it holds a lone surrogate.
    """
    return _checked_text(request_id, "request_id")


def _checked_text(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r} holds a lone surrogate, which UTF-8 cannot carry.") from None
    return text


def connection_options(options: Sequence[tuple[str, Any]], connections: int) -> Sequence[tuple[str, Any]]:
    """The arguments of one of so many channels. gRPC gives channels to one address one connection between them, unless
    each has its own.

    Raises:
        TypeError, ValueError: not a number of connections.
    """
    if not isinstance(connections, Integral):
        raise TypeError(f"connections must be a whole number, not {type(connections).__name__}.")
    if connections < 1:
        raise ValueError(f"a client needs 1 connection or more, not {connections}")
    return options if connections == 1 else [*options, _OWN_CONNECTIONS]
