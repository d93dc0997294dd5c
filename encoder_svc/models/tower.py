"""A checkpoint made ready to run: its encoder on the device, and all that says what it is."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch

from encoder_svc.attention import MMEncoderAttention
from encoder_svc.attention.selfcheck import checked_attention
from encoder_svc.attention.windows import choose_windows
from encoder_svc.models.config_hash import ConfigFactors
from encoder_svc.models.layers import Mlp
from encoder_svc.models.ops_choice import describe, ops_for
from encoder_svc.platforms import platform_for_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from encoder_svc.images.processor import ProcessorSettings
    from encoder_svc.models.base import VisionEncoder
    from encoder_svc.models.checkpoint import Checkpoint
    from encoder_svc.models.checkpoint_weights import Progress
    from encoder_svc.models.workflow import Workflow
    from encoder_svc.platforms import Platform, Selection

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_CUDA_HEAD_STEP: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTower:
    """A loaded encoder.

    Attributes:
        revision: of its weights; see :class:`encoder_svc.models.checkpoint_weights.Weights`.
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
    choose_attention: Callable[[], MMEncoderAttention],
    *,
    platform: Platform,
    device: str,
    dtype: str,
    quantisation: str = "none",
    graph_buckets: Sequence[int] = (),
    progress: Progress | None = None,
    phase_ended: Callable[[str], None] = lambda phase: None,
) -> VisionTower:
    """Builds the checkpoint's encoder and reads its weights. Attention and operations are chosen meanwhile: reading
    leaves Python's lock to their imports and checks for most of its time.

    Args:
        choose_attention: returns the layer that the encoder will run on.
        quantisation: see :func:`encoder_svc.models.ops_choice.refuse_quantisation`.
        graph_buckets: patches of each graph that will be captured: part of the config hash.
        phase_ended: is told of ``"attention"``, ``"operations"`` and ``"weights"`` once they are done.

    Raises:
        CheckpointError: a tensor is missing, surplus or of the wrong shape.
        ConfigError: quantised operations fail their check.
        Exception: what ``choose_attention`` raises.
    """
    on, in_dtype = torch.device(device), TORCH_DTYPES[dtype]
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        shapes = _shapes(checkpoint, dtype)
        reading = thread.submit(checkpoint.read_weights, shapes, device=on, dtype=in_dtype, progress=progress)
        attention = choose_attention()
        phase_ended("attention")
        encoder = _on_meta(checkpoint, attention)
        mlp = encoder.blocks[0].mlp
        assert isinstance(mlp, Mlp)
        ops = ops_for(on, in_dtype, mlp.act, gated=mlp.is_gated, quantisation=quantisation)
        logger.info("operations: %s", describe(ops))
        phase_ended("operations")
        weights = reading.result()
    weights.give_to(encoder)
    encoder.prepare(ops, mean=settings.image_mean, std=settings.image_std)
    phase_ended("weights")
    selection = attention.selection
    factors = ConfigFactors(
        backend=selection.backend,
        implementation=selection.implementation,
        implementation_version=selection.implementation_version,
        dtype=dtype,
        windows=selection.windows,
        operations=describe(ops),
        quantisation=quantisation,
        graph_buckets=tuple(graph_buckets),
        revision=weights.revision,
        torch=torch.__version__,
        platform=platform.name,
        device_name=platform.device_name(),
        processor=settings.hash(),
        workflow=asdict(checkpoint.workflow),
        model_config=asdict(checkpoint.config),
    )
    return VisionTower(
        encoder=encoder.eval(),
        model=checkpoint.name,
        workflow=checkpoint.workflow,
        revision=weights.revision,
        device=on,
        dtype=dtype,
        settings=settings,
        selection=selection,
        platform=platform,
        config_hash=factors.hash(),
    )


def _shapes(checkpoint: Checkpoint, dtype: str) -> dict[str, tuple[int, ...]]:
    """Of the checkpoint's tensors. They do not depend on what the encoder will run on, which is not known yet."""
    reference = make_attention(checkpoint, platform=platform_for_device("cpu"), dtype=dtype, override="TORCH_NAIVE")
    return _on_meta(checkpoint, reference).checkpoint_shapes()


def _on_meta(checkpoint: Checkpoint, attention: MMEncoderAttention) -> VisionEncoder:
    with torch.device("meta"):
        return checkpoint.workflow.load_encoder()(checkpoint.config, attention)


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
            padded_head_size(config.head_size, platform.name),
            config.head_size**-0.5,
            attn_backend=override,
            platform=platform,
            dtype=dtype,
            causal=config.causal,
            flash_attn_implementation=flash_attn_implementation,
            failed=failed,
        )

    attention = build({}) if device is None else checked_attention(build, device)
    if config.window_patches is not None and device is not None:
        choose_windows(attention, config.window_patches, platform, device, pinned=flash_attn_implementation is not None)
    return attention


def padded_head_size(head_size: int, platform: str) -> int:
    """What heads are padded to: on CUDA, whole steps of a tensor core's 16.

    flash-attn 4 takes Qwen3-VL's 72 in 1.28 ms and 80 in 1.07 (8 × 3844 patches, H100).
    """
    return head_size + -head_size % _CUDA_HEAD_STEP if platform == "cuda" else head_size
