"""The client for asyncio code."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import grpc
import grpc.aio

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.client.arguments import (
    call_timeout,
    checked_keys,
    checked_lease,
    checked_request_id,
    checked_target,
    checked_timeout,
    connection_options,
)
from encoder_svc.client.assembler import Assembler, all_good, good_or_error, position
from encoder_svc.client.connections import Connections
from encoder_svc.client.received import stub
from encoder_svc.client.request import encode_request
from encoder_svc.client.trace import trace_metadata
from encoder_svc.client.types import EncodedImage, RetainedImage
from encoder_svc.client.wire import call_error, cancelled_error, closed_error, model_info, unreadable_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from types import TracebackType

    from google.protobuf.message import Message

    from encoder_svc.client.assembler import Result
    from encoder_svc.client.types import ImageInput, ModelInfo
    from encoder_svc.errors import RequestError


class AsyncEncoderClient:
    """A connection to an encoder service, for one event loop. Close it, or use it in an ``async with``.

    Make it in a coroutine: gRPC ties the channel to the loop that runs. Arguments and errors are those of
    :class:`~encoder_svc.client.sync.EncoderClient`.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        timeout_s: float | None = None,
        connections: int = 1,
    ) -> None:
        self.target = checked_target(target)
        self._timeout_s = checked_timeout(timeout_s)
        self._closed = False
        options = connection_options(options, connections)
        self._channels = [
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
            for _ in range(connections)
        ]
        self._connections = Connections([stub(channel) for channel in self._channels])

    async def info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the service serves."""
        return model_info(await self._ask("GetModelInfo", encoder_pb2.GetModelInfoRequest(), timeout_s))

    @overload
    async def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: Literal[False] = False,
    ) -> list[EncodedImage]: ...

    @overload
    async def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: Literal[True],
    ) -> list[EncodedImage | RequestError]: ...

    async def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: bool = False,
    ) -> list[EncodedImage] | list[EncodedImage | RequestError]:
        """Encodes images and returns them in the order given; see :meth:`EncoderClient.encode`."""
        arrived: list[Result] = [
            result async for result in self.stream(images, timeout_s=timeout_s, request_id=request_id)
        ]
        results = sorted(arrived, key=position)
        return good_or_error(results, EncodedImage) if return_errors else all_good(results, EncodedImage)

    async def stream(
        self, images: Sequence[ImageInput], *, timeout_s: float | None = None, request_id: str = ""
    ) -> AsyncIterator[EncodedImage | RequestError]:
        """Encodes images and yields each as it is ready; see :meth:`EncoderClient.stream`."""
        request = encode_request(images, request_id)
        assembler = Assembler(len(request.images))
        async for result in self._results("EncodeImages", request, len(request.images), timeout_s, assembler):
            yield cast("EncodedImage | RequestError", result)

    async def retain(
        self,
        images: Sequence[ImageInput],
        *,
        lease_s: float = 0.0,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> list[RetainedImage]:
        """Encodes images and leaves their embeddings with the server; see :meth:`EncoderClient.retain`."""
        request = encode_request(images, request_id, retain_s=checked_lease(lease_s))
        number = len(request.images)
        answer = self._results("EncodeImages", request, number, timeout_s, Assembler(number, retained=True))
        return all_good(sorted([result async for result in answer], key=position), RetainedImage)

    async def fetch(
        self, keys: Sequence[str], *, timeout_s: float | None = None, request_id: str = ""
    ) -> list[EncodedImage]:
        """Embeddings that were retained, in the order of their keys; see :meth:`EncoderClient.fetch`."""
        request = encoder_pb2.FetchEmbeddingsRequest(keys=checked_keys(keys), request_id=checked_request_id(request_id))
        answer = self._results("FetchEmbeddings", request, len(keys), timeout_s, Assembler(len(keys)))
        return all_good(sorted([result async for result in answer], key=position), EncodedImage)

    async def release(self, keys: Sequence[str], *, timeout_s: float | None = None) -> int:
        """Gives up leases before they end; see :meth:`EncoderClient.release`."""
        request = encoder_pb2.ReleaseEmbeddingsRequest(keys=checked_keys(keys))
        response = await self._ask("ReleaseEmbeddings", request, timeout_s)
        return cast("encoder_pb2.ReleaseEmbeddingsResponse", response).num_released

    async def _ask(self, method: str, request: Message, timeout_s: float | None) -> Any:
        with self._own_errors(), self._connections.taken() as stub:
            response = await self._begin(getattr(stub, method), request, timeout_s)
        if response is None:
            raise unreadable_error()
        return response

    async def _results(
        self, method: str, request: Message, num_images: int, timeout_s: float | None, assembler: Assembler
    ) -> AsyncIterator[Result]:
        with self._own_errors(), self._connections.taken(num_images) as stub:
            call = self._begin(getattr(stub, method), request, timeout_s)
            try:
                async for response in call:
                    settled = assembler.feed(response)
                    if settled is not None:
                        yield settled
            finally:
                call.cancel()
        assembler.finish()

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.target) from None
        except asyncio.CancelledError:
            # Of a call whose client was closed gRPC raises the same as of a task that was cancelled, as none was here.
            if self._closed and (task := asyncio.current_task()) and not task.cancelling():
                raise cancelled_error() from None
            raise

    def _begin(self, method: Callable[..., Any], request: Message, timeout_s: float | None) -> Any:
        seconds = call_timeout(timeout_s, self._timeout_s)
        if self._closed:
            raise closed_error()
        return method(request, timeout=seconds, metadata=trace_metadata())

    async def close(self) -> None:
        """Ends the connection. Calls that run are cancelled; later ones are UNREACHABLE."""
        self._closed = True
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
