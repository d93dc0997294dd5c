"""Qwen3-VL's vision encoder: interpolated position embeddings, and deepstack.

Source: "Qwen3-VL Technical Report" (Qwen team, 2025); deepstack: "DeepStack" (Meng et al., 2024); reference
implementation: transformers' ``Qwen3VLVisionModel``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import nn

from encoder_svc.errors import CheckpointError
from encoder_svc.models.base import ConfigReader, EncoderInputs, VisionConfig, VisionEncoder, zeros_after
from encoder_svc.models.layers import NORM_EPS, Block, Mlp, PatchEmbed, norm_weights
from encoder_svc.models.positions import FRAMES_KEPT, frame_positions, frame_sequences, patch_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.images.types import GridThw
    from encoder_svc.models.ops import Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3VLVisionConfig(VisionConfig):
    """``position_grid_side`` is the side of the square grid of learned position embeddings."""

    intermediate_size: int
    position_grid_side: int
    deepstack_blocks: tuple[int, ...]

    @property
    def num_deepstack(self) -> int:
        return len(self.deepstack_blocks)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLInputs(EncoderInputs):
    """Adds where each patch lies between the learned positions.

    Attributes:
        corner_indices: int64 [N, 4], the four learned positions around each patch.
        corner_weights: float32 [N, 4], their bilinear weights, which add up to 1.
    """

    corner_indices: torch.Tensor
    corner_weights: torch.Tensor

    def padded(self, num_patches: int, *, max_sequences: int) -> Self | None:
        inputs = super().padded(num_patches, max_sequences=max_sequences)
        return inputs and replace(
            inputs,
            corner_indices=zeros_after(self.corner_indices, num_patches),
            corner_weights=zeros_after(self.corner_weights, num_patches),
        )


class PatchMerger(nn.Module):
    """M × M neighbouring patches to one row. The final merger norms patches, deepstack's norm merged rows."""

    def __init__(self, config: Qwen3VLVisionConfig, *, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged_size if norm_after_merge else config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.act = nn.GELU()
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def prepare(self, ops: Ops, shift: torch.Tensor | None) -> None:
        self._ops = ops
        self._norm = norm_weights(self.norm, shift)
        self._first, self._last = ops.lay_out_linear(self.linear_fc1), ops.lay_out_linear(self.linear_fc2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm_after_merge:
            hidden = hidden.view(-1, self.merged_size)
        merged = self._ops.norm(hidden, self._norm).view(-1, self.merged_size)
        return self._ops.linear(self.act(self._ops.linear(merged, self._first)), self._last)


class Qwen3VLEncoder(VisionEncoder):
    """LayerNorm, full attention within each frame; rows are the embedding, then each deepstack level."""

    config: Qwen3VLVisionConfig

    def __init__(self, config: Qwen3VLVisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__(config, attention)
        self.patch_embed = PatchEmbed(config, bias=True)
        # Of given memory: to initialise it on the meta device imports torch._dynamo, 0.8 s of a start.
        self.pos_embed = nn.Embedding.from_pretrained(torch.empty(config.position_grid_side**2, config.hidden_size))
        self.blocks = nn.ModuleList(
            Block(config, attention, self._make_mlp(config), nn.LayerNorm) for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_blocks
        )

    @staticmethod
    def _make_mlp(config: Qwen3VLVisionConfig) -> Mlp:
        return Mlp(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            ups=("linear_fc1",),
            down="linear_fc2",
        )

    @classmethod
    def read_config(cls, reader: ConfigReader) -> Qwen3VLVisionConfig:
        common = VisionConfig.read_common(
            reader, hidden_key="hidden_size", out_key="out_hidden_size", hidden_act="gelu_pytorch_tanh"
        )
        num_positions = reader.positive("num_position_embeddings")
        side = math.isqrt(num_positions)
        if side**2 != num_positions:
            raise CheckpointError(f"{reader.where}: 'num_position_embeddings' {num_positions} is not a square.")
        return Qwen3VLVisionConfig(
            **common,
            intermediate_size=reader.positive("intermediate_size"),
            position_grid_side=side,
            deepstack_blocks=reader.layer_indices("deepstack_visual_indexes", common["depth"]),
        )

    def build_inputs(self, grids: Sequence[GridThw]) -> Qwen3VLInputs:
        merge_size = self.config.spatial_merge_size
        indices, weights = interpolation_corners(grids, merge_size, self.config.position_grid_side)
        return Qwen3VLInputs(
            position_ids=torch.from_numpy(patch_positions(grids, merge_size)),
            sequences=frame_sequences(grids),
            corner_indices=torch.from_numpy(indices),
            corner_weights=torch.from_numpy(weights),
        )

    def prepare_merger(self, index: int, shift: torch.Tensor | None) -> None:
        if index in self.config.deepstack_blocks:
            self._deepstack_merger(index).prepare(self.edge_ops, shift)
        if index == self.config.depth - 1:
            self.merger.prepare(self.edge_ops, shift)

    def forward(self, segments: Sequence[torch.Tensor], inputs: EncoderInputs) -> torch.Tensor:
        assert isinstance(inputs, Qwen3VLInputs)
        rotary = self.rotary(inputs)
        hidden = self.patch_embed(segments)
        self.ops.add_interpolated_(hidden, self.pos_embed.weight, inputs.corner_indices, inputs.corner_weights)
        levels: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            block(hidden, rotary, inputs.sequences)
            if index in self.config.deepstack_blocks:
                levels.append(self._deepstack_merger(index)(hidden))
        return torch.cat([self.merger(hidden), *levels], dim=-1)

    def _deepstack_merger(self, index: int) -> PatchMerger:
        merger = self.deepstack_merger_list[self.config.deepstack_blocks.index(index)]
        assert isinstance(merger, PatchMerger)
        return merger


def interpolation_corners(
    grids: Sequence[GridThw], merge_size: int, side: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Bilinear interpolation, corners aligned, from a ``side`` × ``side`` grid to each image's own, for its patches in
    merge-block order.

    Returns:
        indices: int64 [N, 4] into the flattened grid.
        weights: float32 [N, 4].
    """
    frames = [_frame_corners(grid.h, grid.w, merge_size, side) for grid in grids for _ in range(grid.t)]
    indices, weights = zip(*frames, strict=True)
    return np.concatenate(indices), np.concatenate(weights)


@lru_cache(FRAMES_KEPT)
def _frame_corners(
    height: int, width: int, merge_size: int, side: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of one frame; not to be written."""
    positions = frame_positions(height, width, merge_size)
    steps = np.maximum(np.array([height, width]) - 1, 1).astype(np.float32)
    scaled = positions.astype(np.float32) * np.float32(side - 1) / steps
    low = np.floor(scaled).astype(np.int64)
    high = np.minimum(low + 1, side - 1)
    fraction = scaled - low.astype(np.float32)
    taps = np.stack([low, high], axis=-1)
    tap_weights = np.stack([1 - fraction, fraction], axis=-1)
    indices = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    weights = tap_weights[:, 0, :, None] * tap_weights[:, 1, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)
