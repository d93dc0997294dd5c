"""What is known of the model once it is loaded: for GetModelInfo, and for whoever prepares images for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc import __version__
from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.engine.load import Budgets
from encoder_svc.images.limits import Limits
from encoder_svc.models.workflow import load_input_processor
from encoder_svc.transport.chunks import MAX_CHUNK_BYTES

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
    from encoder_svc.models.tower import VisionTower

DTYPES = {
    "float32": encoder_pb2.DTYPE_FLOAT32,
    "float16": encoder_pb2.DTYPE_FLOAT16,
    "bfloat16": encoder_pb2.DTYPE_BFLOAT16,
}
DTYPE_NAMES = {number: name for name, number in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A loaded model, without its weights.

    Attributes:
        info: what GetModelInfo answers.
        input_processor: ``module:attribute``; see :class:`encoder_svc.models.workflow.Workflow`.
    """

    info: encoder_pb2.GetModelInfoResponse
    settings: ProcessorSettings
    input_processor: str

    def load_processor(self, limits: Limits) -> ImageProcessor:
        """What turns its images into patches."""
        return load_input_processor(self.info.family, self.input_processor)(self.settings, limits)


def model_facts(tower: VisionTower, limits: Limits) -> ModelFacts:
    """Those of a tower."""
    return ModelFacts(_model_info(tower, limits), tower.settings, tower.workflow.input_processor)


def limits_of(config: Config) -> Limits:
    """The operator's limits on what a caller sends."""
    return Limits(
        max_image_bytes=config.max_image_bytes,
        max_request_bytes=config.max_request_bytes,
        max_image_side=config.max_image_side,
        max_image_pixels=config.max_image_pixels,
        max_images=config.max_images,
        max_request_patches=config.max_request_patches,
    )


def budgets_of(config: Config) -> Budgets:
    """The operator's bounds on what is pending."""
    return Budgets(
        max_queued_patches=config.max_queued_patches,
        max_inflight_images=config.max_inflight_images,
        max_inflight_bytes=config.max_inflight_bytes,
    )


def _model_info(tower: VisionTower, limits: Limits) -> encoder_pb2.GetModelInfoResponse:
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
