"""A checkpoint made ready to run: its encoder on the device, and all that says what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from encoder_svc.attention import MMEncoderAttention

if TYPE_CHECKING:
    from encoder_svc.images.processor import ProcessorSettings
    from encoder_svc.models.base import VisionEncoder
    from encoder_svc.models.checkpoint import Checkpoint, Progress
    from encoder_svc.platforms import Platform, Selection

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTower:
    """A loaded encoder.

    Attributes:
        revision: of its weights; see :meth:`Checkpoint.load`.
        config_hash: SHA-256 over everything that shapes results: part of every key of a kept result.
    """

    encoder: VisionEncoder
    model: str
    family: str
    revision: str
    device: torch.device
    dtype: str
    settings: ProcessorSettings
    selection: Selection
    platform: Platform
    config_hash: str


def load_tower(
    checkpoint: Checkpoint,
    settings: ProcessorSettings,
    attention: MMEncoderAttention,
    *,
    platform: Platform,
    device: str,
    dtype: str,
    progress: Progress | None = None,
) -> VisionTower:
    """Builds the checkpoint's encoder on ``attention`` and reads its weights.

    Raises:
        CheckpointError: a tensor is missing, surplus or of the wrong shape.
    """
    with torch.device("meta"):
        encoder = checkpoint.family.encoder_class()(checkpoint.config, attention)
    revision = checkpoint.load(encoder, device=torch.device(device), dtype=TORCH_DTYPES[dtype], progress=progress)
    factors = {
        "revision": revision,
        "config": asdict(checkpoint.config),
        "dtype": dtype,
        "attention": [attention.selection.backend, attention.selection.implementation],
        "torch": torch.__version__,
        "platform": platform.name,
        "device": platform.device_name(),
    }
    return VisionTower(
        encoder=encoder.eval(),
        model=checkpoint.name,
        family=checkpoint.family.name,
        revision=revision,
        device=torch.device(device),
        dtype=dtype,
        settings=settings,
        selection=attention.selection,
        platform=platform,
        config_hash=hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest(),
    )


def make_attention(
    checkpoint: Checkpoint, *, platform: Platform, dtype: str, override: str | None
) -> MMEncoderAttention:
    """The attention layer that a checkpoint's encoder will share. Touches no weights, so a wrong override is found
    before any is read.

    Raises:
        AttentionBackendError: the override cannot run here.
    """
    config = checkpoint.config
    return MMEncoderAttention(
        config.num_heads,
        config.head_size,
        attn_backend=override,
        platform=platform,
        dtype=dtype,
        causal=config.causal,
    )
