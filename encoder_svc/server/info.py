"""What GetModelInfo answers, and the wire's names of things."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc import __version__
from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.transport.chunks import MAX_CHUNK_BYTES

if TYPE_CHECKING:
    from encoder_svc.images.limits import Limits
    from encoder_svc.models.tower import VisionTower

DTYPES = {
    "float32": encoder_pb2.DTYPE_FLOAT32,
    "float16": encoder_pb2.DTYPE_FLOAT16,
    "bfloat16": encoder_pb2.DTYPE_BFLOAT16,
}
DTYPE_NAMES = {number: name for name, number in DTYPES.items()}


def model_info(tower: VisionTower, limits: Limits) -> encoder_pb2.GetModelInfoResponse:
    """All that a client may want to know of this replica."""
    config, settings, selection = tower.encoder.config, tower.settings, tower.selection
    return encoder_pb2.GetModelInfoResponse(
        model=tower.model,
        revision=tower.revision,
        family=tower.workflow.model_type,
        dtype=DTYPES[tower.dtype],
        out_hidden_size=config.out_hidden_size,
        num_deepstack=config.num_deepstack,
        width=config.width,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        spatial_merge_size=config.spatial_merge_size,
        in_channels=config.in_channels,
        processor=encoder_pb2.Processor(
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            image_mean=settings.image_mean,
            image_std=settings.image_std,
            resize=settings.resize,
            hash=settings.hash(),
            image_processing=settings.image_processing,
        ),
        limits=encoder_pb2.Limits(
            max_image_bytes=limits.max_image_bytes,
            max_request_bytes=limits.max_request_bytes,
            max_image_side=limits.max_image_side,
            max_image_pixels=limits.max_image_pixels,
            max_aspect_ratio=limits.max_aspect_ratio,
            max_images=limits.max_images,
            max_request_patches=limits.max_request_patches,
            max_chunk_bytes=MAX_CHUNK_BYTES,
        ),
        attention=encoder_pb2.AttentionSelection(
            backend=selection.backend,
            implementation=selection.implementation,
            source=selection.source,
            reason=selection.reason,
            implementation_version=selection.implementation_version,
            rejected=[
                encoder_pb2.RejectedBackend(backend=rejection.backend, reason=rejection.why)
                for rejection in selection.rejected
            ],
        ),
        transports=["stream", "retain"],
        platform=tower.platform.name,
        device_name=tower.platform.device_name(),
        config_hash=tower.config_hash,
        server_version=__version__,
    )
