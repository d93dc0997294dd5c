"""Qwen2.5-VL's vision encoder: window attention in most blocks, full attention in a few.

Source: "Qwen2.5-VL Technical Report" (Bai et al., 2025); reference implementation: transformers'
``Qwen2_5_VisionTransformerPretrainedModel``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from torch import nn

from encoder_svc.attention.base import PackedSequences
from encoder_svc.errors import CheckpointError
from encoder_svc.models.base import ConfigReader, EncoderInputs, VisionConfig, VisionEncoder
from encoder_svc.models.layers import NORM_EPS, Block, Mlp, PatchEmbed
from encoder_svc.models.positions import FRAMES_KEPT, frame_sequences, patch_positions
from encoder_svc.models.qwen2_vl import PatchMerger

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.images.types import GridThw

# What is padded for a graph holds windows of up to 64 patches, and one for every 8 patches: an image whose sides are no
# multiple of the window's makes more than one for every 64.
_WINDOW_PATCHES: Final = 64
_PATCHES_A_WINDOW: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen25VLVisionConfig(VisionConfig):
    """``window_size`` is a window's side in pixels; blocks in ``full_attention_blocks`` see the whole frame."""

    intermediate_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]

    @property
    def window_side(self) -> int:
        """A window's side in merged blocks."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def window_patches(self) -> int | None:
        return (self.window_side * self.spatial_merge_size) ** 2


@dataclass(frozen=True, kw_only=True)
class Qwen25VLInputs(EncoderInputs):
    """Positions are in window order.

    Attributes:
        windows: the sequences of the window blocks.
        window_order: int64 [rows], the merged block that stands at each place in window order.
        row_order: its inverse.
    """

    windows: PackedSequences
    window_order: torch.Tensor
    row_order: torch.Tensor

    def padded(self, num_patches: int, *, max_sequences: int) -> Self | None:
        inputs = super().padded(num_patches, max_sequences=max_sequences)
        windows = self.windows.padded(num_patches, num_patches // _PATCHES_A_WINDOW + max_sequences, _WINDOW_PATCHES)
        if inputs is None or windows is None:
            return None
        merge_unit = len(self.position_ids) // len(self.window_order)
        rest = torch.arange(len(self.window_order), num_patches // merge_unit)
        return replace(
            inputs,
            windows=windows,
            window_order=torch.cat([self.window_order, rest]),
            row_order=torch.cat([self.row_order, rest]),
        )


class Qwen25VLEncoder(VisionEncoder):
    """RMSNorm, SwiGLU, windows. Between patch embedding and merger everything is in window order."""

    config: Qwen25VLVisionConfig

    def __init__(self, config: Qwen25VLVisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__(config, attention)
        self.patch_embed = PatchEmbed(config, bias=False)
        self.blocks = nn.ModuleList(
            Block(config, attention, self._make_mlp(config), nn.RMSNorm) for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, nn.RMSNorm(config.hidden_size, eps=NORM_EPS))

    @staticmethod
    def _make_mlp(config: Qwen25VLVisionConfig) -> Mlp:
        return Mlp(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            ups=("gate_proj", "up_proj"),
            down="down_proj",
        )

    @classmethod
    def read_config(cls, reader: ConfigReader) -> Qwen25VLVisionConfig:
        common = VisionConfig.read_common(
            reader, hidden_key="hidden_size", out_key="out_hidden_size", hidden_act="silu"
        )
        config = Qwen25VLVisionConfig(
            **common,
            intermediate_size=reader.positive("intermediate_size"),
            window_size=reader.positive("window_size"),
            full_attention_blocks=reader.layer_indices("fullatt_block_indexes", common["depth"]),
        )
        if config.window_side < 1:
            raise CheckpointError(f"{reader.where}: 'window_size' {config.window_size} is less than one merged block.")
        return config

    def build_inputs(self, grids: Sequence[GridThw]) -> Qwen25VLInputs:
        merge = self.config.spatial_merge_size
        order, lengths = window_order(grids, merge, self.config.window_side, largest_first=not self.config.causal)
        positions = patch_positions(grids, merge).reshape(len(order), merge**2, 2)
        row_order = np.empty_like(order)
        row_order[order] = np.arange(len(order))
        return Qwen25VLInputs(
            position_ids=torch.from_numpy(positions[order].reshape(-1, 2)),
            sequences=frame_sequences(grids),
            windows=PackedSequences.of(lengths),
            window_order=torch.from_numpy(order),
            row_order=torch.from_numpy(row_order),
        )

    def prepare_merger(self, index: int, shift: torch.Tensor | None) -> None:
        if index == self.config.depth - 1:
            self.merger.prepare(self.edge_ops, shift)

    def forward(self, segments: Sequence[torch.Tensor], inputs: EncoderInputs) -> torch.Tensor:
        assert isinstance(inputs, Qwen25VLInputs)
        merge_unit = self.config.spatial_merge_size**2
        rotary = self.rotary(inputs)
        hidden = self.patch_embed(segments)
        hidden = hidden.unflatten(0, (-1, merge_unit))[inputs.window_order].flatten(0, 1)
        for index, block in enumerate(self.blocks):
            full = index in self.config.full_attention_blocks
            block(hidden, rotary, inputs.sequences if full else inputs.windows)
        rows: torch.Tensor = self.merger(hidden)
        return rows[inputs.row_order]


def window_order(
    grids: Sequence[GridThw], merge_size: int, window_side: int, *, largest_first: bool
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Which merged block stands where in window order, and each window's length in patches.

    Windows tile each frame from its top left; those at the right and lower edge are smaller. The reference takes them
    row by row.

    Args:
        largest_first: order the windows of a frame by size instead: equal windows then lie next to each other and an
            attention backend can take them as one dense batch. Bidirectional attention does not see the difference.

    Returns:
        order: int64 [rows].
        lengths: one for each window, in that order.
    """
    orders: list[npt.NDArray[np.int64]] = []
    lengths: list[int] = []
    first_row = 0
    for grid in grids:
        frame_order, frame_lengths = _frame_window_order(
            grid.h // merge_size, grid.w // merge_size, window_side, largest_first
        )
        for _ in range(grid.t):
            orders.append(frame_order + first_row)
            lengths.extend(length * merge_size**2 for length in frame_lengths)
            first_row += len(frame_order)
    return np.concatenate(orders), lengths


@lru_cache(FRAMES_KEPT)
def _frame_window_order(
    height: int, width: int, window_side: int, largest_first: bool
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Of one frame; not to be written."""
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
    windows_across = -(-width // window_side)
    window_of_block = (rows // window_side) * windows_across + columns // window_side
    sizes = np.bincount(window_of_block)
    windows = np.argsort(-sizes, kind="stable") if largest_first else np.arange(len(sizes))
    rank = np.empty_like(windows)
    rank[windows] = np.arange(len(sizes))
    return np.argsort(rank[window_of_block], kind="stable"), [int(size) for size in sizes[windows]]
