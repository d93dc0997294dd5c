"""Both sides of the comparison, with the same random weights, and the images they get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from encoder_svc.engine.builder import build_batch
from encoder_svc.engine.runner import DeviceRunner, PreparedBatch
from encoder_svc.images.patches import normalise, patchify
from encoder_svc.images.types import ProcessedImage
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.ops_choice import refuse_quantisation
from encoder_svc.models.tower import TORCH_DTYPES, VisionTower, load_tower, make_attention
from encoder_svc.platforms import platform_for_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from encoder_svc.images.processor import ProcessorSettings

# transformers' names of what may be faster than SDPA on a GPU, where its package is installed.
_FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")


class Ours:
    """Our encoder as the server runs it: from uint8 patches on the device to rows on the device."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        dtype: str,
        backend: str | None,
        graph_max_patches: int,
        quantization: str = "none",
    ) -> None:
        checkpoint = Checkpoint(str(folder))
        platform = platform_for_device(device)
        refuse_quantisation(quantization, device, dtype)
        self.tower: VisionTower = load_tower(
            checkpoint,
            checkpoint.processor_settings(resize="torch"),
            lambda: make_attention(checkpoint, platform=platform, dtype=dtype, override=backend, device=device),
            platform=platform,
            device=device,
            dtype=dtype,
            quantisation=quantization,
        )
        self._runner = DeviceRunner(self.tower)
        self._runner.warm_up(graph_max_patches=graph_max_patches, memory_fraction=0.9, max_batch_patches=65_536)

    def batch(self, images: Sequence[ProcessedImage]) -> PreparedBatch:
        return self._runner.prepare(build_batch(images, self.tower.encoder))

    def rows(self, batch: PreparedBatch) -> torch.Tensor:
        return self._runner.rows(batch)


class Theirs:
    """transformers' vision tower: from normalised pixel values of its dtype on the device to rows on the device."""

    def __init__(self, folder: Path, *, device: str, dtype: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            whole = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
        visual: PreTrainedModel = whole.model.visual
        tensors = {
            name.partition("visual.")[2]: tensor.to(device, TORCH_DTYPES[dtype])
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        visual.load_state_dict(tensors, assign=True)
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(config.vision_config).to(device)  # holds a buffer
        self.visual = visual.eval()
        self.dtype = TORCH_DTYPES[dtype]

    def pixel_values(self, images: Sequence[ProcessedImage], settings: ProcessorSettings) -> torch.Tensor:
        values = normalise(
            torch.from_numpy(np.concatenate([image.patches for image in images])),
            mean=settings.image_mean,
            std=settings.image_std,
            temporal_patch_size=settings.temporal_patch_size,
        )
        return values.to(self.visual.device, self.dtype)

    def rows(self, pixel_values: torch.Tensor, grids: torch.Tensor, attention: str = "sdpa") -> torch.Tensor:
        """Deepstack levels side by side after the embedding, as ours are."""
        self.visual.config._attn_implementation = attention
        output = self.visual(pixel_values, grids)
        levels = getattr(output, "deepstack_features", None)
        return torch.cat([output.pooler_output, *levels], dim=-1) if levels else output.pooler_output

    def attentions(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> list[str]:
        """The attention implementations that run here: SDPA, and on a GPU flash-attn's. Says why of the others."""
        usable = ["sdpa"]
        for name in _FLASH if pixel_values.is_cuda else ():
            try:
                self.visual.set_attn_implementation(name)
                self.rows(pixel_values, grids, name)
                usable.append(name)
            except Exception as error:
                print(f"transformers' {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        self.visual.set_attn_implementation("sdpa")
        return usable


def photographs(folder: Path, side: int, number: int, settings: ProcessorSettings) -> list[ProcessedImage]:
    """Square images of ``side`` pixels, a multiple of the factor: photographs, stretched, no two the same."""
    files = sorted(folder.glob("*.jpg"))
    images = []
    for index in range(number):
        photo = Image.open(files[index % len(files)]).convert("RGB").rotate(90 * (index // len(files)), expand=True)
        pixels_HWC = np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC))
        grid, patches = patchify(pixels_HWC, patch_size=settings.patch_size, merge_size=settings.merge_size)
        images.append(ProcessedImage(grid, patches))
    return images


def relative_error(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """Euclidean length of the difference over that of what is wanted, both float64."""
    return ((rows - wanted).norm() / wanted.norm()).item()


def lowest_cosine(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """The least cosine similarity of a row to what it should be."""
    return torch.nn.functional.cosine_similarity(rows, wanted, dim=-1).min().item()
