"""What one family of models needs, in one object: input processor, input builder, encoder, output processor."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from encoder_svc.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from encoder_svc.engine.builder import Batch
    from encoder_svc.images.limits import Limits
    from encoder_svc.images.processor import ImageProcessor, ProcessorSettings
    from encoder_svc.images.types import EncoderImage, GridThw
    from encoder_svc.models.base import VisionEncoder


class InputProcessor(Protocol):
    """Makes what turns one image into patches, or leaves that to the device;
    :class:`encoder_svc.images.processor.ImageProcessor` is the default."""

    def __call__(self, settings: ProcessorSettings, limits: Limits) -> ImageProcessor: ...


class InputBuilder(Protocol):
    """Packs images into a batch; :func:`encoder_svc.engine.builder.build_batch` is the default."""

    def __call__(self, images: Sequence[EncoderImage], encoder: VisionEncoder) -> Batch: ...


class OutputProcessor(Protocol):
    """Cuts a batch's rows into images, on the device: for each what is sent, [rows, width], views of them or not;
    :func:`encoder_svc.engine.outputs.split_by_image` is the default."""

    def __call__(self, rows: torch.Tensor, grids: Sequence[GridThw], merge_size: int) -> list[torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """A family of checkpoints. Modules are named, as ``module:attribute``, and imported when a checkpoint needs them.

    Attributes:
        model_type: as in the checkpoint's config.json.
        encoder: a subclass of :class:`encoder_svc.models.base.VisionEncoder`.
        input_processor: an :class:`InputProcessor`.
        input_builder: an :class:`InputBuilder`.
        output_processor: an :class:`OutputProcessor`.
        tower_prefixes: what the vision tensors' names start with, in each layout that is in use.
    """

    model_type: str
    encoder: str
    input_processor: str = "encoder_svc.images.processor:ImageProcessor"
    input_builder: str = "encoder_svc.engine.builder:build_batch"
    output_processor: str = "encoder_svc.engine.outputs:split_by_image"
    tower_prefixes: tuple[str, ...] = ("visual.", "model.visual.")

    def load_encoder(self) -> type[VisionEncoder]:
        """
        Raises:
            CheckpointError: the module it names is not there, or has no such attribute; so with all the others.
        """
        return cast("type[VisionEncoder]", _load(self.model_type, self.encoder))

    def load_input_processor(self) -> InputProcessor:
        return load_input_processor(self.model_type, self.input_processor)

    def load_input_builder(self) -> InputBuilder:
        return cast("InputBuilder", _load(self.model_type, self.input_builder))

    def load_output_processor(self) -> OutputProcessor:
        return cast("OutputProcessor", _load(self.model_type, self.output_processor))


def load_input_processor(model_type: str, name: str) -> InputProcessor:
    """A workflow's input processor by its name, for a process that holds no weights.

    Raises:
        CheckpointError: it is not there.
    """
    return cast("InputProcessor", _load(model_type, name))


@cache
def _load(model_type: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"The workflow of {model_type} names {name}, which cannot be loaded: {error}.") from error
