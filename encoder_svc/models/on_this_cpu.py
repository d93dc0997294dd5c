"""What an encoder would run on if this CPU served it, without a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.attention.selfcheck import checked_attention
from encoder_svc.models.ops_choice import describe, ops_for
from encoder_svc.models.tower import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.config import Config
    from encoder_svc.platforms import Platform, Selection

# Which kernels pass their checks does not depend on it.
_NUM_HEADS = 2


def choose_on_this_cpu(platform: Platform, config: Config, *, head_size: int, dtype: str) -> tuple[Selection, str]:
    """Attention and operations as a start chooses them: kernels are compiled, and checked.

    Raises:
        AttentionBackendError: as at start-up.
    """

    def build(failed: Mapping[tuple[str, str], str]) -> MMEncoderAttention:
        return MMEncoderAttention(
            _NUM_HEADS,
            head_size,
            attn_backend=config.mm_encoder_attn_backend,
            platform=platform,
            dtype=dtype,
            flash_attn_implementation=config.mm_encoder_flash_attn_implementation,
            failed=failed,
        )

    attention = checked_attention(build, "cpu")
    return attention.selection, describe(ops_for(torch.device("cpu"), TORCH_DTYPES[dtype]))
