"""The picture, where matplotlib is installed; where it is not, what to do about it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from encoder_svc.bench.plot import check_plot, save_plot
from encoder_svc.errors import ConfigError
from tests.bench.test_report import report_of, run_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib, which is no dependency")
def test_a_picture_is_drawn(encoded, tmp_path: Path) -> None:
    run = run_of(encoded)
    save_plot(report_of(run), run.recorder, tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size == (1500, 600)


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr("encoder_svc.bench.plot.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        check_plot()
