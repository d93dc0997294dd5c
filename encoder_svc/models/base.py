"""What every vision encoder has in common: its config's shared part, its inputs, and how it is called."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from encoder_svc.attention.base import PackedSequences
from encoder_svc.errors import CheckpointError
from encoder_svc.models.layers import Block, PatchEmbed
from encoder_svc.models.positions import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from encoder_svc.attention import MMEncoderAttention
    from encoder_svc.images.types import GridThw
    from encoder_svc.models.ops import Ops, Rotary

T = TypeVar("T")

# Far beyond any encoder, and small enough that no product of dimensions overflows torch's 64 bits.
MAX_DIMENSION: Final = 2**20
_MAX_DEPTH: Final = 2**10
_MAX_PATCH_SIDE: Final = 2**10
_MAX_FACTOR: Final = 2**4


class ConfigReader:
    """Reads one object of a checkpoint's JSON, its ``vision_config`` say, and names what is missing or wrong.

    Args:
        where: what the object is, for error texts: ``"Qwen/Qwen2-VL-7B/config.json: vision_config"``.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def get(self, key: str, kind: type[T], default: T | None = None, *, old_key: str | None = None) -> T:
        """The value of ``key`` (or of ``old_key``, its former spelling). Without a default it must be there.

        Raises:
            CheckpointError: missing, or not of type ``kind``, or NaN, infinity or beyond a float.
        """
        value = self._values.get(key, self._values.get(old_key) if old_key else None)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where} lacks '{key}'.")
            return default
        if kind is float:
            if not _is_number(value):
                raise CheckpointError(f"{self.where}: '{key}' is {value!r}, not a number.")
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.where}: '{key}' is {value!r}, not {kind.__name__}.")
        return value

    def positive(
        self, key: str, default: int | None = None, *, old_key: str | None = None, at_most: int = MAX_DIMENSION
    ) -> int:
        """An integer of at least 1."""
        value = self.get(key, int, default, old_key=old_key)
        if value < 1:
            raise CheckpointError(f"{self.where}: '{key}' is {value}, not a positive number.")
        if value > at_most:
            raise CheckpointError(f"{self.where}: '{key}' is {value}; at most {at_most} is served.")
        return value

    def layer_indices(self, key: str, depth: int) -> tuple[int, ...]:
        """A list of layers, each in 0 … depth - 1, none twice."""
        values = self.get(key, list)
        layers = tuple(value for value in values if type(value) is int and 0 <= value < depth)
        if len(layers) != len(values) or len(set(layers)) != len(layers):
            raise CheckpointError(f"{self.where}: '{key}' is {values!r}: not layers of {depth}.")
        return layers

    def floats(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(key, list, list(default))
        if not all(map(_is_number, values)):
            raise CheckpointError(f"{self.where}: '{key}' is {values!r}, not numbers.")
        return tuple(map(float, values))

    def section(self, key: str) -> ConfigReader:
        """The object under ``key``; an empty one if there is none."""
        return ConfigReader(self.get(key, dict, {}), f"{self.where}: {key}")


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds. JSON as Python reads it has NaN and infinity, and integers of any size."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The dimensions that every family has. Always read from the checkpoint, never assumed.

    Attributes:
        hidden_size: width of the encoder's layers.
        out_hidden_size: width of the LM, and of one embedding without deepstack.
        causal: attention sees earlier patches alone; false in every released Qwen-VL.
    """

    depth: int
    hidden_size: int
    num_heads: int
    hidden_act: str
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    rope_theta: float
    causal: bool

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one patch of pixel values."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def num_deepstack(self) -> int:
        return 0

    @property
    def window_patches(self) -> int | None:
        """Patches of a whole window, where some blocks attend within windows."""
        return None

    @property
    def width(self) -> int:
        """Values in one embedding row, deepstack levels included."""
        return self.out_hidden_size * (1 + self.num_deepstack)

    @staticmethod
    def read_common(reader: ConfigReader, *, hidden_key: str, out_key: str, hidden_act: str) -> dict[str, Any]:
        """The shared fields. ``hidden_act`` is the family's own, for checkpoints that do not spell it out."""
        common: dict[str, Any] = {
            "depth": reader.positive("depth", at_most=_MAX_DEPTH),
            "hidden_size": reader.positive(hidden_key),
            "num_heads": reader.positive("num_heads"),
            "hidden_act": reader.get("hidden_act", str, hidden_act),
            "out_hidden_size": reader.positive(out_key),
            "patch_size": reader.positive("patch_size", at_most=_MAX_PATCH_SIDE),
            "temporal_patch_size": reader.positive("temporal_patch_size", 2, at_most=_MAX_FACTOR),
            "spatial_merge_size": reader.positive("spatial_merge_size", 2, at_most=_MAX_FACTOR),
            "in_channels": reader.positive("in_channels", 3, old_key="in_chans", at_most=_MAX_FACTOR),
            "rope_theta": reader.section("rope_parameters").get("rope_theta", float, 10_000.0),
            "causal": reader.get("is_causal", bool, False),
        }
        if common["rope_theta"] <= 0:
            raise CheckpointError(f"{reader.where}: 'rope_theta' is {common['rope_theta']:g}, not a positive number.")
        if common["hidden_size"] % (4 * common["num_heads"]):
            raise CheckpointError(
                f"{reader.where}: hidden size {common['hidden_size']} over {common['num_heads']} heads leaves no head "
                "size that is a multiple of 4, as 2-D rotary embeddings need."
            )
        return common


@dataclass(frozen=True, kw_only=True)
class EncoderInputs:
    """What a batch needs beside its pixels. Built on the host from the grids alone, then moved as one.

    Attributes:
        position_ids: int64 [N, 2], row and column of each patch, in the order the layers see.
        sequences: one for each frame of each image.
    """

    position_ids: torch.Tensor
    sequences: PackedSequences

    def padded(self, num_patches: int, *, max_sequences: int) -> Self | None:
        """The same for ``num_patches``, of which those beyond the batch's own are padding; on the host.

        Two of one size differ in their tensors' values alone. None where there are more than ``max_sequences`` frames,
        or a family's own sequences are too many.
        """
        sequences = self.sequences.padded(num_patches, max_sequences + 1, num_patches)
        if sequences is None:
            return None
        return replace(self, position_ids=zeros_after(self.position_ids, num_patches), sequences=sequences)

    def to(self, device: torch.device) -> Self:
        """Every tensor of these inputs on ``device``."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, PackedSequences):
                moved[entry.name] = value.to(device)
            elif isinstance(value, torch.Tensor):
                moved[entry.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


def zeros_after(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[n, k] as [num_rows, k]."""
    return F.pad(values, (0, 0, 0, num_rows - len(values)))


class VisionEncoder(nn.Module, abc.ABC):
    """A family's vision tower. Parameter names are those of the family's checkpoints, after the tower's prefix."""

    config: VisionConfig
    patch_embed: PatchEmbed
    blocks: nn.ModuleList

    def __init__(self, config: VisionConfig, attention: MMEncoderAttention) -> None:
        super().__init__()
        self.config = config
        self.attention = attention

    @classmethod
    @abc.abstractmethod
    def read_config(cls, reader: ConfigReader) -> VisionConfig:
        """The family's dimensions out of a checkpoint's ``vision_config``."""

    @abc.abstractmethod
    def build_inputs(self, grids: Sequence[GridThw]) -> EncoderInputs:
        """Positions and boundaries of a batch of images, on the host."""

    def prepare(self, ops: Ops, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """Lays the loaded weights out for ``ops``. Called once; before it nothing can be encoded.

        Args:
            mean, std: by which the checkpoint's processor normalises pixels, a channel.
        """
        self.ops = ops
        self.patch_embed.prepare(ops, mean, std)
        device = self.patch_embed.proj.weight.device
        self._inverse_frequencies = inverse_frequencies(self.config.head_size, self.config.rope_theta, device)
        shift = torch.zeros(self.config.hidden_size, device=device) if ops.defers_bias else None
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            shift = block.prepare(ops.of_block(index, len(self.blocks)), shift, self._inverse_frequencies)
            self.prepare_merger(index, shift)

    @property
    def edge_ops(self) -> Ops:
        """The operations of the last block and of what reads its output: those that round least."""
        return self.ops.of_block(len(self.blocks) - 1, len(self.blocks))

    def rotary(self, inputs: EncoderInputs) -> Rotary:
        """The rotation of the batch's patches, for all blocks."""
        return self.ops.rotary(inputs.position_ids, self._inverse_frequencies, self.attention.head_size)

    @abc.abstractmethod
    def prepare_merger(self, index: int, shift: torch.Tensor | None) -> None:
        """Prepares what reads the output of block ``index``, if anything does. ``shift``: see :meth:`Block.prepare`."""

    @abc.abstractmethod
    def forward(self, segments: Sequence[torch.Tensor], inputs: EncoderInputs) -> torch.Tensor:
        """Patches of all images, one after the other, to embeddings [rows, width].

        Rows of an image follow each other, images in the order of the grids that ``inputs`` was built from.

        Args:
            segments: stretches of one dtype: uint8 [n, channels · patch_size²], pixels of still images, or floating
                [n, patch_dim], normalised pixel values.
        """

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor in a checkpoint. The patch embedding is a Conv3d there and a linear layer here."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        config = self.config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        shapes["patch_embed.proj.weight"] = (config.hidden_size, config.in_channels, *kernel)
        return shapes
