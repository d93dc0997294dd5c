"""What is set for a whole process, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COLLECTIONS = """
import gc
from encoder_svc import garbage

{call}
before = gc.get_stats()[0]["collections"]
made = [[number] for number in range(50_000)]
print(gc.get_stats()[0]["collections"] - before)
"""


@pytest.mark.parametrize(
    ("call", "is_rare"),
    [
        ("pass", False),
        ("garbage.look_for_cycles_rarely()", True),
        ("garbage.look_for_cycles_rarely(); garbage.spare_what_is_loaded()", False),
    ],
)
def test_cycles_are_looked_for_rarely_until_all_is_loaded(call: str, is_rare: bool) -> None:
    program = _COLLECTIONS.format(call=call)
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert (int(said) == 0) == is_rare


def test_what_is_loaded_is_not_looked_through_again() -> None:
    call = "from encoder_svc.garbage import spare_what_is_loaded as spare; spare(); import gc"
    program = f"{call}; print(gc.get_freeze_count())"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(said) > 5_000
