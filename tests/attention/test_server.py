"""A real server under an override of each backend that a CPU can run, and under overrides that it cannot."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from encoder_svc.client import EncoderClient
from tests.serving import ENVIRONMENT, ServerProcess, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKENDS = ("TORCH_SDPA", "TORCH_NAIVE")


def test_each_override_encodes_a_photograph_and_is_reported(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path]
) -> None:
    rows = []
    for backend in BACKENDS:
        options = ("--model", tiny_checkpoint("qwen2_5_vl"), "--device", "cpu")
        with (
            ServerProcess(*options, "--mm-encoder-attn-backend", backend.lower()) as server,
            EncoderClient(server.target) as client,
        ):
            attention = client.info().attention
            assert (attention.backend, attention.implementation, attention.source) == (backend, "torch", "override")
            assert "--mm-encoder-attn-backend" in attention.reason
            rows.append(np.asarray(client.encode(photos[:1])[0].embeddings, dtype=np.float32))
            assert server.log.count(f"attention: {backend} (torch ") == 1
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["FLASHY"], "FLASHY: not a backend of platform cpu or any. Valid here: TORCH_SDPA, TORCH_NAIVE."),
        (["flash_attn"], "flash_attn: not a backend of platform cpu; it runs on cuda and rocm. Valid here"),
        (["ROCM_AITER_FA"], "not a backend of platform cpu; it runs on rocm. Valid here"),
    ],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_a_wrong_override_exits_with_its_sentence(
    tiny_checkpoint: Callable[[str], Path], options: list[str], sentence: str, with_model: bool
) -> None:
    model = ["--model", tiny_checkpoint("qwen2_5_vl")] if with_model else []
    serve = command("serve", "--device", "cpu", "--port", "0", *model, "--mm-encoder-attn-backend", *options)
    started_s = time.monotonic()
    done = subprocess.run(serve, check=False, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    took_s = time.monotonic() - started_s
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]
    assert "loading vision tensors" not in done.stderr
    assert took_s < 5


def test_the_environment_is_an_override_too() -> None:
    serve = command("serve", "--device", "cpu", "--port", "0")
    environment = ENVIRONMENT | {"ENCODER_MM_ENCODER_ATTN_BACKEND": "XFORMERS"}
    done = subprocess.run(serve, check=False, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert "XFORMERS: not a backend of platform cpu; it runs on cuda." in done.stderr
