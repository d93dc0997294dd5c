"""Our towers and transformers' with the same weights, and how to run both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from encoder_svc.images.types import GridThw
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import VisionTower, load_tower, make_attention
from encoder_svc.platforms import platform_for_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from encoder_svc.models.base import VisionConfig

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BACKENDS = ("TORCH_SDPA", "TORCH_NAIVE")

Grids = list[tuple[int, int, int]]

_REFERENCES = {
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig),
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig),
    "qwen3_vl": (Qwen3VLVisionModel, Qwen3VLVisionConfig),
}


def load(
    folder: Path,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    quantisation: str = "none",
) -> VisionTower:
    """Our tower of a checkpoint."""
    checkpoint = Checkpoint(str(folder))
    platform = platform_for_device(device)
    return load_tower(
        checkpoint,
        checkpoint.processor_settings(resize="torch"),
        lambda: make_attention(checkpoint, platform=platform, dtype=dtype, override=backend, device=device),
        platform=platform,
        device=device,
        dtype=dtype,
        quantisation=quantisation,
    )


def reference(folder: Path) -> PreTrainedModel:
    """transformers' vision tower of a complete checkpoint."""
    visual: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.visual
    return visual.eval()


def random_reference(family: str, *, attn_implementation: str = "sdpa", **vision_config: Any) -> PreTrainedModel:
    """transformers' vision tower of any dimensions, with random weights whose norms and biases are not neutral."""
    model_class, config_class = _REFERENCES[family]
    with torch.device("meta"):
        config = config_class(**vision_config)
        config._attn_implementation = attn_implementation
        visual = model_class(config)
    visual.to_empty(device="cpu")
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.dim() == 1:
                parameter.mul_(0.1).add_(float(name.endswith("weight")))
            elif "pos_embed" not in name:
                parameter.mul_(parameter[0].numel() ** -0.5)
    return visual.eval()


def write_checkpoint(folder: Path, family: str, visual: PreTrainedModel, **vision_config: Any) -> None:
    """Writes a tower as a checkpoint that holds nothing else. ``vision_config`` adds to its own."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": family, "vision_config": visual.config.to_dict() | vision_config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text("{}")
    save_file({f"visual.{name}": value for name, value in visual.state_dict().items()}, folder / "model.safetensors")


def random_pixel_values(config: VisionConfig, grids: Grids, seed: int = 0) -> torch.Tensor:
    """[N, patch_dim], every frame different."""
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(num_patches, config.patch_dim, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def rows(tower: VisionTower, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Our rows, float32 on the CPU."""
    encoder = tower.encoder
    inputs = encoder.build_inputs([GridThw(*grid) for grid in grids]).to(tower.device)
    return encoder([pixel_values.to(tower.device)], inputs).float().cpu()


@torch.inference_mode()
def reference_levels(visual: PreTrainedModel, pixel_values: torch.Tensor, grids: Grids) -> list[torch.Tensor]:
    """The reference's rows, then those of each deepstack level."""
    output = visual(pixel_values, torch.tensor(grids))
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def reference_rows(visual: PreTrainedModel, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """The reference's rows, laid out as ours are: deepstack levels side by side after the embedding."""
    return torch.cat(reference_levels(visual, pixel_values, grids), dim=-1)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value wanted."""
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def split_images(values: torch.Tensor, grids: Sequence[tuple[int, int, int]], per_row: int = 1) -> list[torch.Tensor]:
    """Each image's patches, or its rows of ``per_row`` patches."""
    return list(values.split([t * h * w // per_row for t, h, w in grids]))
