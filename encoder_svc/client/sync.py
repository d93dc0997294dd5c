"""The client for ordinary, blocking code."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import grpc

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
from encoder_svc.client.wire import call_error, closed_error, model_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from google.protobuf.message import Message

    from encoder_svc.client.assembler import Result
    from encoder_svc.client.types import ImageInput, ModelInfo
    from encoder_svc.errors import RequestError


class EncoderClient:
    """A connection to an encoder service. Safe to use from many threads; close it, or use it in a ``with``.

    gRPC does not survive a fork: in a process that was forked after a call, this client fails or does not, and so does
    a new one. Start processes with ``multiprocessing.get_context("spawn")``, or fork before the first call, and make a
    client in each.

    Args:
        target: ``host:port``, or any name that gRPC resolves.
        credentials: for TLS (``grpc.ssl_channel_credentials(…)``); without them the connection is in the clear.
        options: gRPC's channel arguments. With :data:`ROUND_ROBIN` each call goes to the next of the replicas that the
            name resolves to; without, all go to one. (:meth:`fetch` must reach the replica that retains.)
        timeout_s: for each call that names none of its own; None and infinity wait without end.
        connections: a call takes the one with the fewest images under way. To a server of several front ends as many as
            it has, or more: each connection is one front end's.

    Raises:
        TypeError: an argument, here or of a call, is of another type.
        ValueError: ``timeout_s``, here or of a call, is negative or not a number; ``connections`` is not 1 or more.
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
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
            for _ in range(connections)
        ]
        self._connections = Connections([stub(channel) for channel in self._channels])

    def info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the service serves.

        Raises:
            RequestError: see :meth:`stream`.
        """
        return model_info(self._ask("GetModelInfo", encoder_pb2.GetModelInfoRequest(), timeout_s))

    @overload
    def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: Literal[False] = False,
    ) -> list[EncodedImage]: ...

    @overload
    def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: Literal[True],
    ) -> list[EncodedImage | RequestError]: ...

    def encode(
        self,
        images: Sequence[ImageInput],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        return_errors: bool = False,
    ) -> list[EncodedImage] | list[EncodedImage | RequestError]:
        """Encodes images and returns them in the order given.

        Args:
            timeout_s: for the whole call; 0 gives it no time, None is the client's own, infinity waits without end.
            request_id: appears in the server's log.
            return_errors: put an image's error in its place in the list, and do not raise it.

        Raises:
            RequestError: the call failed, or an image did (``image_index`` says which; the first by index).
        """
        results = sorted(self.stream(images, timeout_s=timeout_s, request_id=request_id), key=position)
        return good_or_error(results, EncodedImage) if return_errors else all_good(results, EncodedImage)

    def stream(
        self, images: Sequence[ImageInput], *, timeout_s: float | None = None, request_id: str = ""
    ) -> Iterator[EncodedImage | RequestError]:
        """Encodes images and yields each as it is ready: an :class:`EncodedImage`, or the error of that image alone.

        ``index`` (of an error, ``image_index``) says which image it is. Closing the iterator cancels the rest.

        Raises:
            RequestError: the call as a whole failed. Its class follows the gRPC status, its ``reason`` is stable.
            TypeError, ValueError, OSError: an argument is wrong, or something in ``images`` is not an image; before
                anything is sent.
        """
        request = encode_request(images, request_id)
        call = self._stream("EncodeImages", request, len(request.images), timeout_s)
        results = self._results(call, Assembler(len(request.images)))
        return cast("Iterator[EncodedImage | RequestError]", results)

    def retain(
        self,
        images: Sequence[ImageInput],
        *,
        lease_s: float = 0.0,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> list[RetainedImage]:
        """Encodes images and leaves their embeddings with the server, for any process to :meth:`fetch` by key.

        Args:
            lease_s: how long they are kept; 0 for the server's default.

        Raises:
            RequestError: as :meth:`encode`; also LEASE_BYTES_EXHAUSTED for an image that does not fit what may be
                retained. Images that were retained before the one that failed stay so until their lease ends.
        """
        request = encode_request(images, request_id, retain_s=checked_lease(lease_s))
        call = self._stream("EncodeImages", request, len(request.images), timeout_s)
        results = self._results(call, Assembler(len(request.images), retained=True))
        return all_good(sorted(results, key=position), RetainedImage)

    def fetch(self, keys: Sequence[str], *, timeout_s: float | None = None, request_id: str = "") -> list[EncodedImage]:
        """Embeddings that were retained, in the order of their keys. Waits for those that are still being encoded.

        Raises:
            RequestError: KEY_UNKNOWN or KEY_EXPIRED (:class:`NotFoundError`), ``image_index`` being the key's position.
            TypeError: ``keys`` is no list of texts, such as one key, or a generator.
        """
        request = encoder_pb2.FetchEmbeddingsRequest(keys=checked_keys(keys), request_id=checked_request_id(request_id))
        call = self._stream("FetchEmbeddings", request, len(keys), timeout_s)
        return all_good(sorted(self._results(call, Assembler(len(keys))), key=position), EncodedImage)

    def release(self, keys: Sequence[str], *, timeout_s: float | None = None) -> int:
        """Gives up leases before they end, one for each time a key is named; returns how many there were."""
        request = encoder_pb2.ReleaseEmbeddingsRequest(keys=checked_keys(keys))
        response = self._ask("ReleaseEmbeddings", request, timeout_s)
        return cast("encoder_pb2.ReleaseEmbeddingsResponse", response).num_released

    def _ask(self, method: str, request: Message, timeout_s: float | None) -> Any:
        try:
            with self._connections.taken() as stub:
                return self._begin(getattr(stub, method), request, timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.target) from None

    def _stream(self, method: str, request: Message, num_images: int, timeout_s: float | None) -> Any:
        stub, ended = self._connections.take(num_images)
        try:
            call = self._begin(getattr(stub, method), request, timeout_s)
        except BaseException:
            ended(None)
            raise
        # gRPC says so, since the caller may never begin to read the answer. Dropping it cancels the call, if nothing
        # else refers to it.
        reference = weakref.ref(call)

        def tell() -> None:
            finished = reference()
            ended(None if finished is None else finished.code())

        if not call.add_callback(tell):
            tell()
        return call

    def _begin(self, method: Callable[..., Any], request: Message, timeout_s: float | None) -> Any:
        seconds = call_timeout(timeout_s, self._timeout_s)
        try:
            return method(request, timeout=seconds, metadata=trace_metadata())
        except ValueError:  # gRPC's own, for a channel that was closed, perhaps just now by another thread
            if not self._closed:
                raise
            raise closed_error() from None

    def _results(self, call: Any, assembler: Assembler) -> Iterator[Result]:
        try:
            for response in call:
                settled = assembler.feed(response)
                if settled is not None:
                    yield settled
        except grpc.RpcError as error:
            # To gRPC it is the call itself, which its traceback's frames have in hand, and this one what arrived: all
            # of that would stay until the collector of cycles comes by.
            raise call_error(error.with_traceback(None), self.target) from None
        finally:
            call.cancel()
        assembler.finish()

    def close(self) -> None:
        """Ends the connection. Calls that run are cancelled; later ones are UNREACHABLE."""
        self._closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
