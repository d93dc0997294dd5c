"""What a client gives and gets. numpy always; torch and Pillow only where the caller has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import os

    import torch
    from PIL.Image import Image as PilImage

    ImageInput: TypeAlias = str | os.PathLike[str] | bytes | npt.NDArray[np.uint8] | PilImage | "PixelValues"
else:
    ImageInput = Any
"""An image: a path, the bytes of a JPEG, PNG or WebP file, a [height, width, 3] uint8 array, a PIL image, or
:class:`PixelValues`."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class PixelValues:
    """One image as a Hugging Face processor leaves it.

    Attributes:
        values: [t * h * w, patch_dim], float32, float16 or bfloat16 (ml_dtypes), of any byte order.
        grid_thw: (t, h, w) in patches.
    """

    values: npt.NDArray[Any]
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimings:
    """Seconds that one image spent in each stage of the server, one after the other without a gap; 0 where it never
    was, or where the server is older than the stage. h2d, forward and d2h are its whole batch's. See docs/metrics.md.
    """

    admission_s: float
    window_s: float = 0.0
    shared_s: float = 0.0
    decode_wait_s: float = 0.0
    decode_s: float
    resize_s: float
    queue_s: float
    build_s: float = 0.0
    device_wait_s: float = 0.0
    h2d_s: float
    forward_s: float
    d2h_s: float
    collect_s: float = 0.0
    send_wait_s: float = 0.0
    send_s: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedImage:
    """One image's embeddings.

    Attributes:
        index: position of the image in the call.
        embeddings: [rows, width], a view of the bytes received. bfloat16 is ``ml_dtypes.bfloat16``. With deepstack,
            a row is the embedding and then each level: width is out_hidden_size * (1 + num_deepstack).
        grid_thw: (t, h, w) in patches.
        num_deepstack: levels in each row; 0 without deepstack.
        content_key: same key: same image, model and settings; embeddings equal up to rounding of the batch they rode
            in, and byte for byte while cached.
        timings: where the server's time went.
    """

    index: int
    embeddings: npt.NDArray[Any]
    grid_thw: tuple[int, int, int]
    num_deepstack: int
    content_key: str
    timings: StageTimings

    @property
    def out_hidden_size(self) -> int:
        """Width of the LM: values in one embedding without its deepstack levels."""
        return int(self.embeddings.shape[1]) // (1 + self.num_deepstack)

    @property
    def main(self) -> npt.NDArray[Any]:
        """[rows, out_hidden_size], a view: what goes in the place of the image tokens."""
        return self.embeddings[:, : self.out_hidden_size]

    @property
    def deepstack(self) -> npt.NDArray[Any]:
        """[num_deepstack, rows, out_hidden_size], a view: one level for each of the LM's first layers."""
        rows = self.embeddings.shape[0]
        levels = self.embeddings.reshape(rows, 1 + self.num_deepstack, self.out_hidden_size)
        return levels[:, 1:].transpose(1, 0, 2)

    def torch(self) -> torch.Tensor:
        """:attr:`embeddings` as a torch tensor on the CPU, sharing their memory."""
        import torch

        if self.embeddings.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(self.embeddings.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(self.embeddings)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetainedImage:
    """One image whose embeddings stay with the server until they are fetched, released or expire.

    Attributes:
        index: position of the image in the call.
        key: what any process fetches them by, from the same replica.
        grid_thw: (t, h, w) in patches.
        rows, width: shape of the embeddings.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        num_deepstack: levels in each row.
        timings: where the server's time went.
    """

    index: int
    key: str
    grid_thw: tuple[int, int, int]
    rows: int
    width: int
    dtype: str
    num_deepstack: int
    timings: StageTimings


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorInfo:
    """How and where (``host`` or ``device``) the server resizes, and how it normalises. Areas in pixels."""

    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resize: str
    hash: str
    image_processing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsInfo:
    """What the server takes in one request."""

    max_image_bytes: int
    max_request_bytes: int
    max_image_side: int
    max_image_pixels: int
    max_aspect_ratio: int
    max_images: int
    max_request_patches: int
    max_chunk_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionInfo:
    """Which attention backend the server chose, who decided (``override``, ``platform`` or ``promoted``), and why.

    Attributes:
        implementation_version: of the package that carries the backend out.
        rejected: the backends passed over for an automatic choice, each with the reason.
    """

    backend: str
    implementation: str
    source: str
    reason: str
    implementation_version: str
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a replica serves. See GetModelInfoResponse in protos/encoder/v1/encoder.proto."""

    model: str
    revision: str
    family: str
    dtype: str
    out_hidden_size: int
    num_deepstack: int
    width: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    processor: ProcessorInfo
    limits: LimitsInfo
    attention: AttentionInfo
    transports: tuple[str, ...]
    platform: str
    device_name: str
    config_hash: str
    server_version: str
