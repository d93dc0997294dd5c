"""generate() of a transformers model with embeddings from the service: the same tokens as the whole model's.

Three processes: the server, the LM (scripts/demo_lm.py), and this one, which runs the whole model for comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_svc.client import EncoderClient
from encoder_svc.integrations.transformers import RemoteVisionTower, load_language_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving import ServerProcess

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTION = "What is here?"
NUM_TOKENS = 16


def transformers_alone(checkpoint: Path, photos: list[Path]) -> list[int]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import demo
    finally:
        sys.path.pop(0)
    demo.QUESTION, demo.NUM_TOKENS = QUESTION, NUM_TOKENS
    return demo.whole_model(checkpoint, photos)[0]


def lm_process(target: str, checkpoint: Path, photos: list[Path]) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/demo_lm.py"), target, str(checkpoint), QUESTION, str(NUM_TOKENS)]
        + [str(photo) for photo in photos],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_lm_process_generates_the_whole_models_tokens(
    server: Callable[..., ServerProcess], tiny_checkpoint: Callable[[str], Path], photos: list[Path], family: str
) -> None:
    target = server(family, "--resize", "pillow").target
    remote = lm_process(target, tiny_checkpoint(family), photos[:2])
    assert remote["vision_parameters"] == 0
    assert remote["tokens"] == transformers_alone(tiny_checkpoint(family), photos[:2])
    # Were the images ignored, the tokens would be the same for others.
    assert remote["tokens"] != transformers_alone(tiny_checkpoint(family), photos[2:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_runs_unchanged_on_a_processors_pixel_values(
    server: Callable[..., ServerProcess], tiny_checkpoint: Callable[[str], Path], photos: list[Path], family: str
) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    checkpoint = tiny_checkpoint(family)
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    pixels = processor([Image.open(photo).convert("RGB") for photo in photos[:2]], return_tensors="pt")
    rows = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
    prompt = "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in rows) + QUESTION
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == whole.config.image_token_id).int()
    arguments = {**inputs, **pixels, "max_new_tokens": NUM_TOKENS, "do_sample": False}
    with EncoderClient(server(family).target) as client:
        remote = load_language_model(str(checkpoint), client, dtype=torch.float32).eval()
        assert torch.equal(remote.generate(**arguments), whole.generate(**arguments))


def test_the_tower_refuses_what_is_neither_patches_nor_embeddings(server) -> None:
    with EncoderClient(server("qwen2_vl").target) as client:
        tower = RemoteVisionTower(client)
        with pytest.raises(ValueError, match="neither 16 patches nor 4 rows"):
            tower(torch.zeros(5, 64), grid_thw=torch.tensor([[1, 4, 4]]))


def test_a_model_of_another_family_is_refused(server, tiny_checkpoint) -> None:
    with (
        EncoderClient(server("qwen2_vl").target) as client,
        pytest.raises(ValueError, match="the service serves a qwen2_vl"),
    ):
        load_language_model(str(tiny_checkpoint("qwen3_vl")), client)


def test_a_prompt_for_another_number_of_images_is_refused(server, tiny_checkpoint, photos: list[Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("qwen2_vl"))
    with EncoderClient(server("qwen2_vl").target) as client:
        images = client.encode([np.zeros((56, 56, 3), np.uint8)])
        with pytest.raises(ValueError, match="holds 2"):
            RemoteVisionTower(client).generation_inputs(tokenizer, "<|image_pad|><|image_pad|>", images)
