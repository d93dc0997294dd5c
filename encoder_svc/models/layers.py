"""Layers that the families share. Each holds a checkpoint's parameters under the checkpoint's names; once these are
loaded, ``prepare`` lays them out for the device, and only then can it run.

Shapes: N patches, C hidden_size, H heads, D head_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.attention.triton_windows import MAX_WINDOW_PATCHES
from encoder_svc.models.ops import CENTRE, LinearWeights, MlpWeights, NormWeights, Ops, Rotary, check_activation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.attention import MMEncoderAttention, PackedSequences
    from encoder_svc.models.base import VisionConfig

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches to [N, C]: the checkpoint's Conv3d, whose stride is its kernel, as the matrix product that it is.

    Still images come as uint8, one frame for all T of the temporal patch, and are never normalised: with
    ``u = (x - 128) / 128`` a normalised value is ``u · 128 / (255 std) + (128 / 255 - mean) / std``, so the factor goes
    into the weights, the rest into the bias, and the weights of all frames are added up.
    """

    def __init__(self, config: VisionConfig, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=bias)
        self._blocks = (config.in_channels, config.temporal_patch_size, config.patch_size**2)

    def prepare(self, ops: Ops, mean: Sequence[float], std: Sequence[float]) -> None:
        """Folds the normalisation of the checkpoint's processor into weights for uint8 patches."""
        weight = self.proj.weight
        mean_C, std_C = (torch.tensor(values, dtype=torch.float64, device=weight.device) for values in (mean, std))
        frame_OCF = weight.double().unflatten(1, self._blocks).sum(2)
        folded = (frame_OCF * (CENTRE / 255 / std_C)[:, None]).flatten(1)
        bias = (frame_OCF.sum(2) * ((CENTRE / 255 - mean_C) / std_C)).sum(1)
        if self.proj.bias is not None:
            bias += self.proj.bias
        padding = -folded.shape[1] % ops.row_multiple
        self._folded = LinearWeights(F.pad(folded, (0, padding)).to(weight.dtype), bias.to(weight.dtype))
        self._ops = ops

    def forward(self, segments: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            segments: of the batch, in order: uint8 [n, channels · patch_size²] or floating [n, patch_dim].
        """
        embedded = [self._embed(segment) for segment in segments]
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)

    def _embed(self, segment: torch.Tensor) -> torch.Tensor:
        dtype = self.proj.weight.dtype
        if segment.dtype == torch.uint8:
            return F.linear(self._ops.centre(segment, dtype), self._folded.weight, self._folded.bias)
        projected: torch.Tensor = self.proj(segment.to(dtype))
        return projected


class SelfAttention(nn.Module):
    """One qkv projection, 2-D rotary embedding, packed attention, output projection.

    Where attention was made for wider heads than the config's, because its kernels take them faster, each half of a
    head is padded with zeros: no score and no output changes.
    """

    def __init__(self, config: VisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.padding = (attention.head_size - config.head_size) // 2
        self.attention = attention
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def prepare(self, ops: Ops, norm: NormWeights, inverse_frequencies: torch.Tensor) -> None:
        self._ops = ops
        if self.padding:
            self._pad_heads()
        self._qkv = ops.lay_out_qkv(norm, self.qkv, self.num_heads, inverse_frequencies)
        self._proj = ops.lay_out_linear(self.proj)

    def _pad_heads(self) -> None:
        halves = (2 * self.num_heads, -1)
        weight = self.qkv.weight.data.unflatten(0, (3, *halves))
        bias = self.qkv.bias.data.unflatten(0, (3, *halves))
        out = self.proj.weight.data.unflatten(1, halves)
        self.qkv.weight = _frozen(F.pad(weight, (0, 0, 0, self.padding)).flatten(0, 2))
        self.qkv.bias = _frozen(F.pad(bias, (0, self.padding)).flatten())
        self.proj.weight = _frozen(F.pad(out, (0, self.padding)).flatten(1))

    def add_(self, hidden: torch.Tensor, rotary: Rotary, sequences: PackedSequences) -> None:
        """Adds its output for what its norm makes of ``hidden`` to ``hidden``."""
        qkv_N3HD = self._ops.rotated_qkv(hidden, self._qkv, rotary)
        windows = self.attention.windows
        if windows is not None and sequences.max_seqlen <= MAX_WINDOW_PATCHES:
            out_NHD = windows(qkv_N3HD, sequences)
        else:
            q_NHD, k_NHD, v_NHD = qkv_N3HD.unbind(1)
            out_NHD = self.attention(q_NHD, k_NHD, v_NHD, *sequences)
        self._ops.add_linear_(hidden, out_NHD.flatten(1), self._proj)


class Mlp(nn.Module):
    """Two linear layers, or a gated MLP (Shazeer, 2020) where ``ups`` names a gate and an up layer.

    Args:
        ups, down: what the checkpoint calls the layers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, *, ups: Sequence[str], down: str) -> None:
        super().__init__()
        self._names = (*ups, down)
        self.act = check_activation(act)
        for name in ups:
            self.add_module(name, nn.Linear(hidden_size, intermediate_size))
        self.add_module(down, nn.Linear(intermediate_size, hidden_size))

    @property
    def is_gated(self) -> bool:
        return len(self._names) == 3

    @property
    def down(self) -> nn.Linear:
        layer = self.get_submodule(self._names[-1])
        assert isinstance(layer, nn.Linear)
        return layer

    def lay_out(self, ops: Ops, norm: NormWeights) -> MlpWeights:
        """Its weights for ``ops``, with those of the norm before it."""
        layers = [self.get_submodule(name) for name in self._names]
        *ups, down = (layer for layer in layers if isinstance(layer, nn.Linear))
        return ops.lay_out_mlp(norm, ups, down, self.act)


class Block(nn.Module):
    """Attention and MLP, each on normed input and added to what it had. LayerNorm or RMSNorm: ``norm``."""

    def __init__(
        self, config: VisionConfig, attention: MMEncoderAttention, mlp: Mlp, norm: type[nn.LayerNorm | nn.RMSNorm]
    ) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = norm(config.hidden_size, eps=NORM_EPS)
        self.attn = SelfAttention(config, attention)
        self.mlp = mlp

    def prepare(self, ops: Ops, shift: torch.Tensor | None, inverse_frequencies: torch.Tensor) -> torch.Tensor | None:
        """
        Args:
            shift: the biases that were left out before this block; see :attr:`Ops.defers_bias`.

        Returns:
            Those left out up to its end.
        """
        self._ops = ops
        self.attn.prepare(ops, norm_weights(self.norm1, shift), inverse_frequencies)
        shift = _and_bias(shift, self.attn.proj)
        self._mlp = self.mlp.lay_out(ops, norm_weights(self.norm2, shift))
        return _and_bias(shift, self.mlp.down)

    def forward(self, hidden: torch.Tensor, rotary: Rotary, sequences: PackedSequences) -> None:
        """Changes ``hidden`` in place."""
        self.attn.add_(hidden, rotary, sequences)
        self._ops.add_mlp_(hidden, self._mlp)


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def norm_weights(norm: nn.Module, shift: torch.Tensor | None) -> NormWeights:
    """A norm's weights; wider than ``shift``, it norms several patches side by side."""
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    assert norm.weight is not None
    assert norm.eps is not None
    if shift is not None and norm.weight.numel() != shift.numel():
        shift = shift.repeat(norm.weight.numel() // shift.numel())
    return NormWeights(norm.weight, norm.bias if isinstance(norm, nn.LayerNorm) else None, norm.eps, shift)


def _and_bias(shift: torch.Tensor | None, layer: nn.Linear) -> torch.Tensor | None:
    return None if shift is None else shift + layer.bias.float()
