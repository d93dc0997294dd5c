"""What an LM process imports. Needs no torch::

from encoder_svc.client import EncoderClient

with EncoderClient("127.0.0.1:50051") as client:
    for image in client.encode(["a.jpg", "b.png"]):
        print(image.embeddings.shape, image.grid_thw)
"""

from encoder_svc.client.aio import AsyncEncoderClient
from encoder_svc.client.sync import EncoderClient
from encoder_svc.client.types import (
    AttentionInfo,
    EncodedImage,
    ImageInput,
    LimitsInfo,
    ModelInfo,
    PixelValues,
    ProcessorInfo,
    RetainedImage,
    StageTimings,
)
from encoder_svc.client.wire import ROUND_ROBIN
from encoder_svc.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)

__all__ = [
    "ROUND_ROBIN",
    "AsyncEncoderClient",
    "AttentionInfo",
    "CancelledError",
    "DeadlineError",
    "EncodedImage",
    "EncoderClient",
    "ImageInput",
    "InternalError",
    "InvalidInputError",
    "LimitsInfo",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "PixelValues",
    "ProcessorInfo",
    "RequestError",
    "RetainedImage",
    "StageTimings",
    "UnavailableError",
]
