"""What the load generator's tests share: images and errors as a client gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.client.types import EncodedImage, StageTimings

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def encoded() -> Callable[..., EncodedImage]:
    """Makes an image of t * h * w patches, four to a row, eight float32 values wide."""

    def make(grid_thw: tuple[int, int, int] = (1, 4, 6), *, forward_s: float = 0.01) -> EncodedImage:
        timings = StageTimings(
            admission_s=0.001, decode_s=0.002, resize_s=0.003, queue_s=0.004, h2d_s=0.0, forward_s=forward_s,
            d2h_s=0.0, send_s=0.005,
        )  # fmt: skip
        rows = int(np.prod(grid_thw)) // 4
        return EncodedImage(
            index=0,
            embeddings=np.zeros((rows, 8), np.float32),
            grid_thw=grid_thw,
            num_deepstack=0,
            content_key="",
            timings=timings,
        )

    return make
