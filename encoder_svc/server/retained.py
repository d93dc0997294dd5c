"""What FetchEmbeddings and ReleaseEmbeddings do with embeddings that wait under their content keys."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.cache.keys import KEY_DIGITS
from encoder_svc.errors import Reason, RequestError, request_error
from encoder_svc.observability.stages import Stages
from encoder_svc.server.answer import Answer

if TYPE_CHECKING:
    import grpc.aio

    from encoder_svc.observability.request import RequestRecord
    from encoder_svc.server.pipeline import Pipeline
    from encoder_svc.server.serving import Serving


async def fetch_embeddings(
    serving: Serving,
    pipeline: Pipeline,
    request: encoder_pb2.FetchEmbeddingsRequest,
    context: grpc.aio.ServicerContext[Any, Any],
    record: RequestRecord,
) -> None:
    """Streams what is kept, key by key. A key that is not ends only its own item.

    Raises:
        RequestError: what ends the whole request.
        CallerLeftError: nobody is there to be answered.
    """
    pipeline.processor.limits.check_request_id(request.request_id)
    pipeline.processor.limits.check_num_keys(len(request.keys))
    record.admitted(len(request.keys))
    answer = Answer(
        context,
        pipeline.info,
        record,
        num_images=len(request.keys),
        request_id=request.request_id,
        send_timeout_s=serving.send_timeout_s,
    )
    for index, key in enumerate(request.keys):
        async with AsyncExitStack() as held:
            try:
                if len(key) > KEY_DIGITS:  # nobody else is troubled with what is no key
                    raise request_error(Reason.KEY_UNKNOWN, f"A key has {KEY_DIGITS} hex digits.")
                embeddings = await held.enter_async_context(pipeline.core.fetch(key))
            except RequestError as error:
                await answer.failure(index, error)
                continue
            await answer.image(index, key, embeddings, outcome="fetched", stages=Stages(), ready_s=time.monotonic())
            del embeddings  # the next key may be waited for
    await answer.end()


async def release_embeddings(
    pipeline: Pipeline, request: encoder_pb2.ReleaseEmbeddingsRequest
) -> encoder_pb2.ReleaseEmbeddingsResponse:
    """Ends leases; those that are none are passed over.

    Raises:
        RequestError: no keys, or too many.
    """
    pipeline.processor.limits.check_num_keys(len(request.keys))
    keys = [key for key in request.keys if len(key) <= KEY_DIGITS]
    return encoder_pb2.ReleaseEmbeddingsResponse(num_released=await pipeline.core.release(keys))
