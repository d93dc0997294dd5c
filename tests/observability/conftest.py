"""Fixtures of the tests of what an operator sees."""

from __future__ import annotations

import pytest

from tests.ports import free_port


@pytest.fixture
def port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    return free_port()
