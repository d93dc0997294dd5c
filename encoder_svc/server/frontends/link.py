"""How two of our own processes talk: a line of JSON for each question, answer and notice, over a socket.

What is large goes through shared memory (transport/arena.py); the lines say where it is. Neither side trusts a caller's
bytes to this: they are ours alone, of one version.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from encoder_svc.errors import Reason, RequestError, request_error

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

Handler = Any
"""A function of the fields that it names: for a notice, a plain one; for a question, a coroutine function."""


class Link(asyncio.Protocol):
    """One end. Belongs to the event loop.

    Args:
        handlers: what the other side may ask and tell, by name.
        on_lost: called once, when the other side is gone.
    """

    def __init__(self, handlers: Mapping[str, Handler], on_lost: Callable[[], None] = lambda: None) -> None:
        self._handlers = handlers
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._is_lost = False
        self._received: list[bytes] = []
        self._to_send: list[bytes] = []
        self._last_question = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}

    @classmethod
    async def over(cls, end: socket.socket, handlers: Mapping[str, Handler], on_lost: Callable[[], None]) -> Link:
        """A link over one end of a pair of sockets, which is then the link's."""
        _, link = await asyncio.get_running_loop().create_connection(lambda: cls(handlers, on_lost), sock=end)
        return link

    async def ask(self, what: str, **fields: Any) -> Any:
        """Asks and returns the answer. Cancelling it cancels the other side's work.

        Raises:
            RequestError: as it was raised there; CANCELLED if the other side ends meanwhile.
        """
        if self._is_lost:
            raise _gone()
        self._last_question += 1
        number = self._last_question
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._send({"do": what, "with": fields, "ask": number})
        try:
            return await answer
        except asyncio.CancelledError:
            self._send({"cancel": number})
            raise
        finally:
            self._waiting.pop(number, None)
            # An error's traceback holds this frame, and those of who asked: the message, images. Were this to hold the
            # error in turn, they would stay until the collector of cycles comes by.
            del answer

    def tell(self, what: str, **fields: Any) -> None:
        """Says something that wants no answer."""
        self._send({"do": what, "with": fields})

    def close(self) -> None:
        """Ends it, once what was said is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._received.append(data)
        if b"\n" not in data:
            return
        *lines, rest = b"".join(self._received).split(b"\n")
        self._received = [rest]
        for line in lines:
            self._hear(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self._is_lost = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_gone())
        for task in self._answering.values():
            task.cancel()
        self._on_lost()

    def _send(self, message: dict[str, Any]) -> None:
        """Sends what one turn of the loop says in one go."""
        if not self._to_send:
            asyncio.get_running_loop().call_soon(self._flush)
        self._to_send.append(json.dumps(message, separators=(",", ":")).encode())

    def _flush(self) -> None:
        if self._transport is None or not self._to_send:
            return
        said, self._to_send = self._to_send, []
        self._transport.write(b"\n".join((*said, b"")))

    def _hear(self, message: dict[str, Any]) -> None:
        if "do" in message:
            handler, fields = self._handlers[message["do"]], message["with"]
            if (number := message.get("ask")) is None:
                handler(**fields)
            else:
                answering = self._answering[number] = asyncio.create_task(self._answer(number, handler, fields))
                # Also of one that is cancelled before it has begun.
                answering.add_done_callback(lambda _: self._answering.pop(number, None))
        elif "cancel" in message:
            if task := self._answering.get(message["cancel"]):
                task.cancel()
        elif (answer := self._waiting.get(message["to"])) and not answer.done():
            if "error" in message:
                reason, said, retry_after_s = message["error"]
                answer.set_exception(request_error(Reason(reason), said, retry_after_s=retry_after_s))
            else:
                answer.set_result(message["is"])

    async def _answer(self, number: int, handler: Handler, fields: dict[str, Any]) -> None:
        try:
            answer = {"is": await handler(**fields)}
        except RequestError as error:
            answer = {"error": [error.reason, error.message, error.retry_after_s]}
        except Exception:
            logger.exception("a question of another process failed")
            answer = {"error": [Reason.INTERNAL, "The server failed on this image.", None]}
        self._send({"to": number, **answer})


def _gone() -> RequestError:
    return request_error(Reason.CANCELLED, "The process that was asked ended.")
