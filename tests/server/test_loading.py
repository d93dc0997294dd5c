"""What is decided before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from encoder_svc.config import load_config
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.start import StartPhases
from encoder_svc.server.loading import Loader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("override", ["TORCH_SDPA", None])
def test_an_override_is_checked_before_and_the_platforms_choice_while_weights_are_read(
    tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, override: str | None
) -> None:
    flags = {"device": "cpu", "dtype": "float32", "mm_encoder_attn_backend": override}
    caplog.set_level("INFO")
    loader = Loader(
        load_config(flags=flags, environment={}).config,
        str(tiny_checkpoint("qwen2_vl")),
        Metrics(),
        StartPhases(0.0),
    )
    assert ("attention: TORCH_SDPA" in caplog.text) == (override is not None)
    assert loader.load_tower().selection.source == ("override" if override else "platform")
    assert caplog.text.count("attention: TORCH_SDPA") == 1
