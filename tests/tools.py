"""Programs that some tests drive and that pip does not bring; scripts/install_test_tools.sh installs them."""

from __future__ import annotations

import os
import shutil

import pytest


def require(program: str) -> str:
    """The path of ``program``. Without it the test is skipped; in CI (``CI_REQUIRE_TOOLS=1``) it fails."""
    if (path := shutil.which(program)) is not None:
        return path
    missing = f"{program} is not installed: see scripts/install_test_tools.sh"
    if os.environ.get("CI_REQUIRE_TOOLS") == "1":
        pytest.fail(missing)
    pytest.skip(missing)
