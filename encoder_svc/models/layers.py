"""Layers and position arithmetic that the families share.

Shapes: N patches, H heads, D head_size, M spatial_merge_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.attention.base import PackedSequences
from encoder_svc.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.images.types import GridThw
    from encoder_svc.models.base import VisionConfig

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [N, 1, D]."""


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An activation by its name in Hugging Face configs."""
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"vision_config's hidden_act '{name}' is not known; known: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


class PatchEmbed(nn.Module):
    """Pixel values [N, patch_dim] to [N, hidden_size]: the checkpoint's Conv3d, whose stride is its kernel, as the
    matrix product that it is."""

    def __init__(self, config: VisionConfig, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.proj(pixel_values)
        return projected


class SelfAttention(nn.Module):
    """One qkv projection, 2-D rotary embedding, packed attention, output projection."""

    def __init__(self, config: VisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention = attention
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, rotary: Rotary, sequences: PackedSequences) -> torch.Tensor:
        q_NHD, k_NHD, v_NHD = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out_NHD = self.attention(rotate(q_NHD, rotary), rotate(k_NHD, rotary), v_NHD, *sequences)
        projected: torch.Tensor = self.proj(out_NHD.flatten(1))
        return projected


def rotary_embedding(position_ids: torch.Tensor, head_size: int, theta: float) -> Rotary:
    """cos and sin of 2-D rotary position embeddings, float32 [N, 1, D].

    The first quarter of a head's angles follow the patch's row, the second its column, and both repeat, so that
    the whole head rotates. Source: RoFormer (Su et al., 2021), in the axial form of Qwen2-VL (Wang et al., 2024).

    Args:
        position_ids: int64 [N, 2], row and column of each patch.
    """
    half = head_size // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=position_ids.device) / half
    inverse_frequencies = 1.0 / theta**exponents
    angles_N2F = position_ids.float().unsqueeze(-1) * inverse_frequencies
    angles_N1D = angles_N2F.flatten(1).repeat(1, 2).unsqueeze(1)
    return angles_N1D.cos(), angles_N1D.sin()


def rotate(x_NHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Applies rotary embeddings in float32, as the reference does, and returns x's dtype."""
    cos, sin = rotary
    x = x_NHD.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_NHD.dtype)


def patch_positions(grids: Sequence[GridThw], merge_size: int) -> npt.NDArray[np.int64]:
    """Row and column of every patch, int64 [N, 2], in merge-block order, frame after frame."""
    return np.concatenate([np.tile(_frame_positions(g.h, g.w, merge_size), (g.t, 1)) for g in grids])


def _frame_positions(height: int, width: int, merge_size: int) -> npt.NDArray[np.int64]:
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
    blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
    return np.stack([x.reshape(blocks).swapaxes(1, 2).ravel() for x in (rows, columns)], axis=1)


def frame_sequences(grids: Sequence[GridThw]) -> PackedSequences:
    """One sequence for each frame of each image: attention never crosses frames."""
    return PackedSequences.of([g.h * g.w for g in grids for _ in range(g.t)])
