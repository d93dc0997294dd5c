"""What some tests need of the machine: programs that pip does not bring (scripts/install_test_tools.sh does), IPv6."""

from __future__ import annotations

import os
import shutil
import socket

import pytest


def require(program: str, *others: str) -> str:
    """The path of ``program``, or of one that does as well. Without any the test is skipped; in CI
    (``CI_REQUIRE_TOOLS=1``) it fails."""
    for name in (program, *others):
        if (path := shutil.which(name)) is not None:
            return path
    missing = f"{program} is not installed: see scripts/install_test_tools.sh"
    if os.environ.get("CI_REQUIRE_TOOLS") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def require_ipv6() -> None:
    """Skips the test where the machine has none, as many a container."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error.strerror}")
