"""What is decided before a weight is read, and the photograph that is encoded after."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.config import load_config
from encoder_svc.errors import StartupError
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.start import StartPhases
from encoder_svc.server.loading import Loader
from tests.models.checkpoints import edit_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.models.checkpoints import Tensors


def loader_of(model: Path, **flags: str | None) -> Loader:
    config = load_config(flags={"device": "cpu", "dtype": "float32", **flags}, environment={}).config
    return Loader(config, str(model), Metrics(), StartPhases(0.0))


@pytest.mark.parametrize("override", ["TORCH_SDPA", None])
def test_an_override_is_checked_before_and_the_platforms_choice_while_weights_are_read(
    tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, override: str | None
) -> None:
    caplog.set_level("INFO")
    loader = loader_of(tiny_checkpoint("qwen2_vl"), mm_encoder_attn_backend=override)
    assert ("attention: TORCH_SDPA" in caplog.text) == (override is not None)
    assert loader.load_tower().selection.source == ("override" if override else "platform")
    assert caplog.text.count("attention: TORCH_SDPA") == 1


@pytest.mark.parametrize("override", ["TORCH_SDPA", None])
def test_a_pin_inside_a_backend_that_is_not_taken_is_warned_of(
    tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, override: str | None
) -> None:
    caplog.set_level("WARNING")
    loader_of(tiny_checkpoint("qwen2_vl"), mm_encoder_attn_backend=override, mm_encoder_flash_attn_implementation="fa2")
    assert "--mm-encoder-flash-attn-implementation fa2 has no effect" in caplog.text


@pytest.mark.parametrize("limit", [{"max_image_side": "28"}, {"max_image_pixels": "100"}, {"max_image_bytes": "1KiB"}])
async def test_limits_on_what_callers_send_do_not_concern_the_first_photograph(
    tiny_checkpoint: Callable[[str], Path], limit: dict[str, str]
) -> None:
    loaded = await loader_of(tiny_checkpoint("qwen2_vl"), **limit).load()
    [(name, given)] = limit.items()
    assert getattr(loaded.facts.info.limits, name) == int(given.replace("1KiB", "1024"))
    await loaded.core.engine.aclose()


def with_nan(tensors: Tensors) -> None:
    tensors["visual.patch_embed.proj.weight"][0, 0] = torch.nan


def huge(tensors: Tensors) -> None:
    tensors["visual.patch_embed.proj.weight"].mul_(1e6)


@pytest.mark.parametrize(("change", "dtype"), [(with_nan, "float32"), (huge, "float16")])
async def test_weights_that_yield_no_numbers_refuse_the_start_and_name_checkpoint_and_dtype(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, change: Callable[[Tensors], None], dtype: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny_checkpoint("qwen2_vl"), folder)
    edit_tensors(folder, change)
    with pytest.raises(StartupError, match=f"^--model spoilt in {dtype}: .* NaN or infinity"):
        await loader_of(folder, dtype=dtype).load()
