"""How a checkpoint wants its images: preprocessor_config.json, or processor_config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoder_svc.errors import CheckpointError
from encoder_svc.images.processor import ProcessorSettings
from encoder_svc.models.base import ConfigReader

if TYPE_CHECKING:
    from encoder_svc.images.resize import ImageProcessing, ResizeFlavour
    from encoder_svc.models.base import VisionConfig
    from encoder_svc.models.checkpoint_files import CheckpointFiles

# transformers' defaults (Qwen2VLImageProcessor), for preprocessor configs that leave them out.
_DEFAULT_MIN_PIXELS = 56 * 56
_DEFAULT_MAX_PIXELS = 28 * 28 * 1280
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3
_MAX_PIXELS = 2**31 - 1


def read_processor_settings(
    files: CheckpointFiles,
    config: VisionConfig,
    *,
    resize: ResizeFlavour,
    image_processing: ImageProcessing,
    min_pixels: int | None,
    max_pixels: int | None,
) -> ProcessorSettings:
    """See :meth:`encoder_svc.models.checkpoint.Checkpoint.processor_settings`."""
    reader = _reader(files)
    _refuse_other_processing(reader, config)
    size = reader.section("size")
    low = min_pixels or reader.get("min_pixels", int, 0)
    low = low or size.get("shortest_edge", int, 0) or size.get("min_pixels", int, _DEFAULT_MIN_PIXELS)
    high = max_pixels or reader.get("max_pixels", int, 0)
    high = high or size.get("longest_edge", int, 0) or size.get("max_pixels", int, _DEFAULT_MAX_PIXELS)
    settings = ProcessorSettings(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        min_pixels=low,
        max_pixels=high,
        image_mean=reader.floats("image_mean", _CLIP_MEAN),
        image_std=reader.floats("image_std", _CLIP_STD),
        resize=resize,
        image_processing=image_processing,
    )
    _refuse_nonsense(settings, files.name, config, reader)
    return settings


def _reader(files: CheckpointFiles) -> ConfigReader:
    values = files.read_json("preprocessor_config.json")
    if values is not None:
        return ConfigReader(values, f"{files.name}/preprocessor_config.json")
    values = files.read_json("processor_config.json")
    if values is not None and "image_processor" in values:
        return ConfigReader(values, f"{files.name}/processor_config.json").section("image_processor")
    raise CheckpointError(
        f"{files.name}: has neither preprocessor_config.json nor processor_config.json with an image_processor."
    )


def _refuse_other_processing(reader: ConfigReader, config: VisionConfig) -> None:
    ours = {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": _BICUBIC,
    }
    for key, wanted in ours.items():
        value = reader.get(key, type(wanted), wanted)
        if value != wanted:
            raise CheckpointError(f"{reader.where}: {key} is {value!r}; only {wanted!r} is served.")
    if abs(reader.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
        raise CheckpointError(f"{reader.where}: rescale_factor is not 1/255.")


def _refuse_nonsense(settings: ProcessorSettings, name: str, config: VisionConfig, reader: ConfigReader) -> None:
    if settings.min_pixels < 1 or settings.max_pixels > _MAX_PIXELS:
        raise CheckpointError(
            f"{reader.where}: min_pixels {settings.min_pixels} and max_pixels {settings.max_pixels} must lie from 1 to "
            f"{_MAX_PIXELS}."
        )
    if not settings.factor**2 <= settings.max_pixels or settings.min_pixels > settings.max_pixels:
        raise CheckpointError(
            f"{name}: min_pixels {settings.min_pixels} and max_pixels {settings.max_pixels} leave no size: "
            f"max_pixels must be at least min_pixels and {settings.factor}²."
        )
    if not len(settings.image_mean) == len(settings.image_std) == config.in_channels == 3:
        raise CheckpointError(f"{name}: image_mean, image_std and in_channels must each speak of 3 channels.")
    if min(settings.image_std) <= 0:
        raise CheckpointError(f"{reader.where}: image_std is {list(settings.image_std)}, not positive numbers.")
