"""Checkpoints in Hugging Face's format: a local folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from encoder_svc.errors import CheckpointError
from encoder_svc.models.base import ConfigReader
from encoder_svc.models.checkpoint_files import Folder, is_folder
from encoder_svc.models.checkpoint_hub import Hub
from encoder_svc.models.checkpoint_processor import read_processor_settings
from encoder_svc.models.checkpoint_weights import read_weights
from encoder_svc.models.registry import find_workflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from encoder_svc.images.processor import ProcessorSettings
    from encoder_svc.images.resize import ImageProcessing, ResizeFlavour
    from encoder_svc.models.base import VisionConfig
    from encoder_svc.models.checkpoint_files import CheckpointFiles
    from encoder_svc.models.checkpoint_weights import Progress, Weights


class Checkpoint:
    """A checkpoint whose configs were read and whose weights were not.

    Attributes:
        name: the hub id, or the folder's name.
        commit: the hub's commit; None for a folder.
        workflow: the modules that its family needs.
        config: the vision tower's dimensions.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        """
        Args:
            model: a folder, or a hub id such as ``Qwen/Qwen2.5-VL-7B-Instruct``.
            revision: branch, tag or commit of a hub id.

        Raises:
            CheckpointError: not found, no vision tower, or an architecture that is not served; a revision of a folder.
        """
        self._files: CheckpointFiles = Folder(Path(model)) if is_folder(Path(model)) else Hub(model, revision)
        if revision is not None and isinstance(self._files, Folder):
            raise CheckpointError(
                f"--revision {revision}: is for hub ids; --model {model} is a folder, which has none."
            )
        self.name = self._files.name
        self.commit = self._files.commit
        config = self._files.read_json("config.json")
        if config is None:
            raise CheckpointError(f"{model}: has no config.json.")
        self.workflow = find_workflow(config.get("model_type"), f"{model}/config.json")
        vision_config = config.get("vision_config")
        if not isinstance(vision_config, dict):
            raise CheckpointError(f"{model}: config.json has no vision_config; this checkpoint has no vision tower.")
        self.config: VisionConfig = self.workflow.load_encoder().read_config(
            ConfigReader(vision_config, f"{model}/config.json: vision_config")
        )

    def processor_settings(
        self,
        *,
        resize: ResizeFlavour,
        image_processing: ImageProcessing = "host",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> ProcessorSettings:
        """How this checkpoint wants its images, from preprocessor_config.json (or processor_config.json).

        Args:
            resize, image_processing: the operator's choices of numerics and place.
            min_pixels, max_pixels: the operator's own bounds in place of the checkpoint's.

        Raises:
            CheckpointError: no such file, or it asks for processing that is not done here.
        """
        return read_processor_settings(
            self._files,
            self.config,
            resize=resize,
            image_processing=image_processing,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )

    def read_weights(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Weights:
        """Reads the vision tower's tensors, each straight to the device and dtype.

        Args:
            shapes: of every tensor by its name in the tower; see :meth:`VisionEncoder.checkpoint_shapes`.

        Raises:
            CheckpointError: names each tensor that is missing, surplus, of the wrong shape or not floating point.
        """
        return read_weights(
            self._files, self.workflow.tower_prefixes, shapes, device=device, dtype=dtype, progress=progress
        )
