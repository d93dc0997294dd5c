"""The floor's arithmetic, at the real checkpoints' dimensions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.support.arithmetic import count
from encoder_svc.attention import MMEncoderAttention
from encoder_svc.images.types import GridThw
from encoder_svc.models.base import ConfigReader
from encoder_svc.models.registry import find_workflow
from encoder_svc.models.synthetic import _model_config
from encoder_svc.platforms import platform_for_device


def tera_operations(family: str, grid: GridThw, number: int = 1) -> float:
    encoder_class = find_workflow(family, "").load_encoder()
    values = _model_config(family, "real", "bfloat16").to_dict()["vision_config"]
    config = encoder_class.read_config(ConfigReader(values, ""))
    attention = MMEncoderAttention(16, config.head_size, platform=platform_for_device("cpu"), dtype="bfloat16")
    with torch.device("meta"):
        encoder = encoder_class(config, attention)
    return count(config, encoder.build_inputs([grid] * number)).total / 1e12


@pytest.mark.parametrize(
    ("family", "side", "one_small", "eight_large"),
    [("qwen2_vl", 14, 1.49, 88.5), ("qwen2_5_vl", 14, 1.35, 58.1), ("qwen3_vl", 16, 0.79, 42.6)],
)
def test_it_counts_what_the_performance_page_counts(
    family: str, side: int, one_small: float, eight_large: float
) -> None:
    small, large = (GridThw(1, pixels // side // 2 * 2, pixels // side // 2 * 2) for pixels in (448, 1008))
    assert tera_operations(family, small) == pytest.approx(one_small, abs=0.005)
    assert tera_operations(family, large, 8) == pytest.approx(eight_large, abs=0.05)
