"""Generated files are what their sources make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.deploy.queries import DASHBOARD

SOURCE = Path(__file__).parents[2] / "scripts" / "dashboard"


def test_the_dashboard_is_what_its_source_makes() -> None:
    made = subprocess.run([sys.executable, "-B", SOURCE], capture_output=True, text=True, check=True).stdout
    assert DASHBOARD.read_text() == made, "run make docs"
