"""Which of a client's connections a call takes."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHUNNED_S: Final = 1.0
"""For so long a connection that broke is taken only where all did: its calls fail at once, so that it looks idle."""


class Connections:
    """A client's connections. A call takes the one with the fewest images under way, of several the next in turn.

    A server deals connections out among its front ends by chance, so that some have many and others none: by turns
    alone calls would wait for the former while the latter wait for calls. Safe in many threads.

    Args:
        stubs: the service's methods, on each connection.
        clock: in seconds.
    """

    def __init__(self, stubs: Sequence[Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._stubs = stubs
        self._clock = clock
        self._lock = threading.Lock()
        self._num_images = [0] * len(stubs)
        self._shunned_until_s = [float("-inf")] * len(stubs)
        self._next = 0

    def take(self, num_images: int) -> tuple[Any, Callable[[grpc.StatusCode | None], None]]:
        """The methods on a connection, for a call of so many images, and what to call once when that has ended: with
        its status, or None if nothing is known of the connection by it."""
        with self._lock:
            now_s, number = self._clock(), len(self._stubs)
            index = min(
                ((self._next + step) % number for step in range(number)),
                key=lambda index: (self._shunned_until_s[index] > now_s, self._num_images[index]),
            )
            self._next = (index + 1) % number
            self._num_images[index] += num_images

        def ended(status: grpc.StatusCode | None) -> None:
            with self._lock:
                self._num_images[index] -= num_images
                if status is grpc.StatusCode.UNAVAILABLE:
                    self._shunned_until_s[index] = self._clock() + SHUNNED_S

        return self._stubs[index], ended

    @contextmanager
    def taken(self, num_images: int = 0) -> Iterator[Any]:
        """The same for a call that begins and ends in a ``with``."""
        stub, ended = self.take(num_images)
        status = None
        try:
            yield stub
        except grpc.RpcError as error:
            status = error.code()
            raise
        finally:
            ended(status)
