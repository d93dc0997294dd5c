"""The config hash changes with each factor alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from encoder_svc.models.config_hash import ConfigFactors

FACTORS = ConfigFactors(
    backend="FLASH_ATTN",
    implementation="fa4",
    implementation_version="4.0.0",
    dtype="bfloat16",
    revision="sha256:00",
    torch="2.11.0",
    platform="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    model_config={"depth": 32, "causal": False},
)

OTHERS = {
    "backend": "TRITON_ATTN",
    "implementation": "fa3",
    "implementation_version": "4.0.1",
    "dtype": "float16",
    "revision": "sha256:01",
    "torch": "2.11.1",
    "platform": "rocm",
    "device_name": "NVIDIA H200",
    "windows": "TRITON_ATTN (triton 3.6.0)",
    "operations": "quack triton 3.6.0",
    "quantisation": "fp8",
    "graph_buckets": (1024,),
    "processor": "00",
    "workflow": {"output_processor": "theirs:split"},
    "model_config": {"depth": 32, "causal": True},
}


def test_every_factor_is_tried() -> None:
    assert OTHERS.keys() == {field.name for field in fields(ConfigFactors)}


@pytest.mark.parametrize("factor", OTHERS)
def test_one_factor_alone_changes_it(factor: str) -> None:
    assert replace(FACTORS, **{factor: OTHERS[factor]}).hash() != FACTORS.hash()


def test_no_two_of_them_give_the_same() -> None:
    hashes = {replace(FACTORS, **{factor: value}).hash() for factor, value in OTHERS.items()}
    assert len(hashes) == len(OTHERS)


def test_it_is_the_same_in_another_process() -> None:
    code = "from tests.models.test_config_hash import FACTORS; print(FACTORS.hash())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == replace(FACTORS).hash()
