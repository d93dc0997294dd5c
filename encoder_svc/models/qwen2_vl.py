"""Qwen2-VL's vision encoder.

Source: "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution" (Wang et al., 2024);
reference implementation: transformers' ``Qwen2VisionTransformerPretrainedModel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.errors import CheckpointError
from encoder_svc.models.base import MAX_DIMENSION, ConfigReader, EncoderInputs, VisionConfig, VisionEncoder
from encoder_svc.models.layers import NORM_EPS, Block, Mlp, PatchEmbed, norm_weights
from encoder_svc.models.positions import frame_sequences, patch_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.images.types import GridThw
    from encoder_svc.models.ops import Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2VLVisionConfig(VisionConfig):
    """``embed_dim`` of the checkpoint is our hidden_size, its ``hidden_size`` our out_hidden_size."""

    intermediate_size: int


class PatchMerger(nn.Module):
    """M × M neighbouring patches [N, hidden_size] to one row [N / M², out_hidden_size]."""

    def __init__(self, config: VisionConfig, norm: nn.Module) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = norm
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_size, self.merged_size),
            nn.GELU(),
            nn.Linear(self.merged_size, config.out_hidden_size),
        )

    def prepare(self, ops: Ops, shift: torch.Tensor | None) -> None:
        self._ops = ops
        self._norm = norm_weights(self.ln_q, shift)
        first, _, last = self.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        self._first, self._last = ops.lay_out_linear(first), ops.lay_out_linear(last)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        merged = self._ops.norm(hidden, self._norm).view(-1, self.merged_size)
        return self._ops.linear(F.gelu(self._ops.linear(merged, self._first)), self._last)


class Qwen2VLEncoder(VisionEncoder):
    """LayerNorm, quick GELU, full attention within each frame."""

    config: Qwen2VLVisionConfig

    def __init__(self, config: Qwen2VLVisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__(config, attention)
        self.patch_embed = PatchEmbed(config, bias=False)
        self.blocks = nn.ModuleList(
            Block(config, attention, self._make_mlp(config), nn.LayerNorm) for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, nn.LayerNorm(config.hidden_size, eps=NORM_EPS))

    @staticmethod
    def _make_mlp(config: Qwen2VLVisionConfig) -> Mlp:
        return Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, ups=("fc1",), down="fc2")

    @classmethod
    def read_config(cls, reader: ConfigReader) -> Qwen2VLVisionConfig:
        common = VisionConfig.read_common(
            reader, hidden_key="embed_dim", out_key="hidden_size", hidden_act="quick_gelu"
        )
        intermediate_size = int(common["hidden_size"] * reader.get("mlp_ratio", float, 4.0))
        if not 1 <= intermediate_size <= MAX_DIMENSION:
            raise CheckpointError(f"{reader.where}: 'mlp_ratio' leaves the MLP {intermediate_size} values wide.")
        return Qwen2VLVisionConfig(**common, intermediate_size=intermediate_size)

    def build_inputs(self, grids: Sequence[GridThw]) -> EncoderInputs:
        positions = patch_positions(grids, self.config.spatial_merge_size)
        return EncoderInputs(position_ids=torch.from_numpy(positions), sequences=frame_sequences(grids))

    def prepare_merger(self, index: int, shift: torch.Tensor | None) -> None:
        if index == self.config.depth - 1:
            self.merger.prepare(self.edge_ops, shift)

    def forward(self, segments: Sequence[torch.Tensor], inputs: EncoderInputs) -> torch.Tensor:
        rotary = self.rotary(inputs)
        hidden = self.patch_embed(segments)
        for block in self.blocks:
            block(hidden, rotary, inputs.sequences)
        rows: torch.Tensor = self.merger(hidden)
        return rows
