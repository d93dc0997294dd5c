"""The client for asyncio code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, overload

import grpc
import grpc.aio

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client.wire import Assembler, call_error, encode_request, model_info, position, raise_first_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType

    from encoder_svc.client.types import EncodedImage, ImageInput, ModelInfo
    from encoder_svc.errors import RequestError


class AsyncEncoderClient:
    """A connection to an encoder service, for one event loop. Close it, or use it in an ``async with``.

    Make it in a coroutine: gRPC ties the channel to the loop that runs. Arguments and errors are those of
    :class:`~encoder_svc.client.sync.EncoderClient`.
    """

    def __init__(
        self, target: str, *, credentials: grpc.ChannelCredentials | None = None, timeout_s: float | None = None
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._channel = (
            grpc.aio.insecure_channel(target) if credentials is None else grpc.aio.secure_channel(target, credentials)
        )
        self._stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(self._channel)

    async def info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the service serves."""
        request = encoder_pb2.GetModelInfoRequest()
        try:
            response = await self._stub.GetModelInfo(request, timeout=timeout_s or self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.target) from None
        return model_info(response)

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
        arrived = [result async for result in self.stream(images, timeout_s=timeout_s, request_id=request_id)]
        results = sorted(arrived, key=position)
        if return_errors:
            return results
        return raise_first_error(results)

    async def stream(
        self, images: Sequence[ImageInput], *, timeout_s: float | None = None, request_id: str = ""
    ) -> AsyncIterator[EncodedImage | RequestError]:
        """Encodes images and yields each as it is ready; see :meth:`EncoderClient.stream`."""
        request = encode_request(images, request_id)
        assembler = Assembler(len(request.images))
        call = self._stub.EncodeImages(request, timeout=timeout_s or self._timeout_s)
        try:
            async for response in call:
                settled = assembler.feed(response)
                if settled is not None:
                    yield settled
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.target) from None
        finally:
            call.cancel()
        assembler.finish()

    async def close(self) -> None:
        """Ends the connection. Calls that run are cancelled."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
