from __future__ import annotations

import pytest

from encoder_svc.server.front import _milliseconds


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0, 0), (1e-9, 1), (0.0015, 2), (1.5, 1500), (1e308, 2**31 - 1)])
def test_a_duration_is_what_grpc_takes(seconds: float, wanted: int) -> None:
    assert _milliseconds(seconds) == wanted
