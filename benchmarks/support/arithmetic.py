"""How much arithmetic an encoder cannot avoid: matrix products and attention, counted from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from encoder_svc.models.qwen2_5_vl import Qwen25VLInputs, Qwen25VLVisionConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encoder_svc.models.base import EncoderInputs, VisionConfig


class Arithmetic(NamedTuple):
    """Floating-point operations of one batch; a multiplication and an addition are two."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def count(config: VisionConfig, inputs: EncoderInputs) -> Arithmetic:
    """The arithmetic of one forward of the batch that ``inputs`` was built for.

    The patch embedding counts as in the checkpoint, both frames of a temporal patch. Norms, rotary embeddings,
    activations and the softmax are left out: a machine does them beside its matrix products.
    """
    num_patches = inputs.position_ids.shape[0]
    hidden, depth = config.hidden_size, config.depth
    intermediate: int = config.intermediate_size
    mlp_matrices = 3 if isinstance(config, Qwen25VLVisionConfig) else 2
    weights_a_block = 4 * hidden**2 + mlp_matrices * hidden * intermediate
    merged = hidden * config.spatial_merge_size**2
    weights_of_mergers = (1 + config.num_deepstack) * merged * (merged + config.out_hidden_size)
    products = 2 * num_patches * (config.patch_dim * hidden + depth * weights_a_block)
    products += 2 * num_patches / config.spatial_merge_size**2 * weights_of_mergers
    return Arithmetic(products, sum(4 * hidden * _pairs(lengths) for lengths in _layers(config, inputs)))


def _layers(config: VisionConfig, inputs: EncoderInputs) -> list[Sequence[int]]:
    """The lengths of the sequences in each layer."""
    full = inputs.sequences.lengths
    if isinstance(config, Qwen25VLVisionConfig) and isinstance(inputs, Qwen25VLInputs):
        return [full if i in config.full_attention_blocks else inputs.windows.lengths for i in range(config.depth)]
    return [full] * config.depth


def _pairs(lengths: Sequence[int]) -> int:
    return sum(length**2 for length in lengths)
