"""How much memory processes of one server share, and which options ask for it where it cannot be had."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from encoder_svc.errors import ConfigError
from encoder_svc.images.processor import PIXEL_VALUE_DTYPES
from encoder_svc.server.info import DTYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encoder_svc.config import Config
    from encoder_svc.server.info import ModelFacts

# Of the arena: what holes between blocks may take.
_HOLES: Final = 1.25

EMBEDDING_OPTIONS: Final = ("cache_bytes", "max_leased_bytes", "max_queued_patches", "max_request_patches")
IMAGE_OPTIONS: Final = ("max_decoded_bytes", "max_request_patches", "max_image_pixels", "frontend_processes")
DEVICE_EMBEDDING_OPTIONS: Final = (*EMBEDDING_OPTIONS, "cpu_devices")
DEVICE_IMAGE_OPTIONS: Final = (
    *("max_decoded_bytes", "max_request_patches", "max_image_pixels"),
    *("max_batch_patches", "max_queued_patches", "cpu_devices"),
)


def embedding_bytes(config: Config, facts: ModelFacts) -> int:
    """Room for all that may be kept, retained, or pending. Most of it is never touched, and takes no memory."""
    info = facts.info
    value_bytes = PIXEL_VALUE_DTYPES[DTYPE_NAMES[info.dtype]].itemsize
    patch_bytes = info.width * value_bytes // info.spatial_merge_size**2
    pending = (config.max_queued_patches + config.max_request_patches) * patch_bytes
    return round((config.cache_bytes + config.max_leased_bytes + pending) * _HOLES)


def image_bytes(config: Config, facts: ModelFacts) -> int:
    """Room for the images of one process that wait for another: ``max_decoded_bytes``, and the largest of all."""
    settings = facts.settings
    pixel_values = (
        config.max_request_patches * settings.patch_dim * max(dtype.itemsize for dtype in PIXEL_VALUE_DTYPES.values())
    )
    largest = max(pixel_values, config.max_image_pixels * settings.channels)
    return config.max_decoded_bytes + largest


def batch_bytes(config: Config, facts: ModelFacts, max_batch_patches: int) -> int:
    """Room for the batches that one device holds at a time: that which it encodes, and the next, or one beside it."""
    pending = config.max_queued_patches + config.max_request_patches
    value_bytes = max(dtype.itemsize for dtype in PIXEL_VALUE_DTYPES.values())
    return round(2 * min(max_batch_patches, pending) * facts.settings.patch_dim * value_bytes * _HOLES)


@contextmanager
def asked_for_by(options: tuple[str, ...], num_bytes: int) -> Iterator[None]:
    """Inside, so many bytes are mapped.

    Raises:
        ConfigError: they cannot be had; names ``options``.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{', '.join(options)}: ask for {num_bytes / 2**30:,.1f} GiB of memory that processes share, which this "
            f"process may not have ({error.strerror})."
        ) from error
