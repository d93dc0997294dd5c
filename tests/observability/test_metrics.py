"""What a scrape of a real server says."""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from encoder_svc.client import EncoderClient
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "source"), [((), "platform"), (("--mm-encoder-attn-backend", "torch_naive"), "override")]
)
def test_build_info_names_the_model_and_the_attention_backend(
    tiny_checkpoint: Callable[[str], Path], port: int, options: tuple[str, ...], source: str
) -> None:
    serving = ServerProcess(
        "--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--metrics-port", str(port), *options
    )
    with serving, EncoderClient(serving.target) as client:
        info = client.info()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
        assert serving.stop() == 0
    [sample] = families["encoder_build_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "version": info.server_version,
        "device": info.device_name,
        "dtype": "float32",
        "model": info.model,
        "revision": info.revision,
        "platform": "cpu",
        "attn_backend": info.attention.backend,
        "attn_implementation": info.attention.implementation,
        "attn_source": source,
    }
