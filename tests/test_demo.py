"""``make demo``, ended before its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.serving import ENVIRONMENT

DEMO = Path(__file__).parents[1] / "scripts/demo.py"


def test_one_that_is_told_to_end_takes_its_server_and_its_folder_along(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, DEMO], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    ) as demo:
        assert any("serving on" in line for line in demo.stdout)
        # The LM's process may be about to begin; it ends by itself.
        servers = [child for child in psutil.Process(demo.pid).children() if "serve" in child.cmdline()]
        demo.terminate()
        assert demo.wait(30) == 143
    assert len(servers) == 1
    assert not servers[0].is_running()
    assert list(tmp_path.glob("encoder-svc-*")) == []
