from __future__ import annotations

import pytest
import torch

from encoder_svc.errors import CheckpointError
from encoder_svc.models.ops import Ops, check_activation


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(CheckpointError, match="'relu7'"):
        check_activation("relu7")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_pixel_value_is_centred_without_loss(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, -1)
    assert torch.equal(Ops().centre(values, dtype).double() * 128 + 128, values.double())
