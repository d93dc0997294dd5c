"""The photograph that a server encodes before it takes any from a caller: what it serves has then worked once."""

from __future__ import annotations

import asyncio
import importlib.resources
from typing import TYPE_CHECKING

from encoder_svc.errors import BrokenDeviceError, Reason, RequestError, StartupError
from encoder_svc.images.limits import Limits
from encoder_svc.images.types import EncodedImageBytes
from encoder_svc.server.info import DTYPE_NAMES

if TYPE_CHECKING:
    from encoder_svc.engine.engine import Engine
    from encoder_svc.server.info import ModelFacts


async def encode_first_image(engine: Engine, facts: ModelFacts, num_devices: int = 1) -> None:
    """Decodes, resizes and encodes it, once on each device.

    Raises:
        BrokenDeviceError: the device cannot encode it, nor anything else.
        StartupError: it cannot be encoded; names the checkpoint and the dtype.
    """
    photograph = importlib.resources.files("encoder_svc.server").joinpath("warmup.jpg").read_bytes()
    # Not the operator's limits: those are on what callers send.
    plan = facts.load_processor(Limits()).plan(EncodedImageBytes(photograph))
    try:
        image = await asyncio.to_thread(plan.process)
        outcomes = await asyncio.gather(*(engine.encode(image) for _ in range(num_devices)), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
    except RequestError as error:
        refusal = BrokenDeviceError if engine.broken.is_set() else StartupError
        raise refusal(_explain(error, facts)) from error


def _explain(error: RequestError, facts: ModelFacts) -> str:
    what = f"--model {facts.info.model} in {DTYPE_NAMES[facts.info.dtype]}"
    if error.reason == Reason.OUTPUT_NOT_FINITE:
        return (
            f"{what}: the embeddings of a photograph are NaN or infinity. The checkpoint's weights or config are "
            "damaged, or its values are too large for this --dtype (float16 holds the smallest range)."
        )
    return f"{what}: a photograph cannot be encoded at start. {error.message} [{error.reason}]"
