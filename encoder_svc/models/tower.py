"""A checkpoint made ready to run: its encoder on the device, and all that says what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.attention.selfcheck import checked_attention
from encoder_svc.models.config_hash import ConfigFactors
from encoder_svc.models.ops import ops_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.images.processor import ProcessorSettings
    from encoder_svc.models.base import VisionEncoder
    from encoder_svc.models.checkpoint import Checkpoint, Progress
    from encoder_svc.models.workflow import Workflow
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
    workflow: Workflow
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
        encoder = checkpoint.workflow.load_encoder()(checkpoint.config, attention)
    revision = checkpoint.load(encoder, device=torch.device(device), dtype=TORCH_DTYPES[dtype], progress=progress)
    ops = ops_for(torch.device(device), TORCH_DTYPES[dtype])
    encoder.prepare(ops, mean=settings.image_mean, std=settings.image_std)
    selection = attention.selection
    factors = ConfigFactors(
        backend=selection.backend,
        implementation=selection.implementation,
        implementation_version=selection.implementation_version,
        dtype=dtype,
        revision=revision,
        torch=torch.__version__,
        platform=platform.name,
        device_name=platform.device_name(),
        workflow=asdict(checkpoint.workflow),
        model_config=asdict(checkpoint.config),
    )
    return VisionTower(
        encoder=encoder.eval(),
        model=checkpoint.name,
        workflow=checkpoint.workflow,
        revision=revision,
        device=torch.device(device),
        dtype=dtype,
        settings=settings,
        selection=selection,
        platform=platform,
        config_hash=factors.hash(),
    )


def make_attention(
    checkpoint: Checkpoint,
    *,
    platform: Platform,
    dtype: str,
    override: str | None,
    flash_attn_implementation: str | None = None,
    device: str | None = None,
) -> MMEncoderAttention:
    """The attention layer that a checkpoint's encoder will share. Touches no weights, so a wrong override is found
    before any is read.

    Args:
        device: where to run the start-up check; None for no check.

    Raises:
        AttentionBackendError: the override cannot run here, or failed the check.
        AttentionKernelError: without a check, the kernel does not load.
    """
    config = checkpoint.config

    def build(failed: Mapping[tuple[str, str], str]) -> MMEncoderAttention:
        return MMEncoderAttention(
            config.num_heads,
            config.head_size,
            attn_backend=override,
            platform=platform,
            dtype=dtype,
            causal=config.causal,
            flash_attn_implementation=flash_attn_implementation,
            failed=failed,
        )

    return build({}) if device is None else checked_attention(build, device)
