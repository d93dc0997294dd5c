from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from encoder_svc.config import load_config
from encoder_svc.server import entrance

if TYPE_CHECKING:
    from collections.abc import Mapping


def number(device: str, *, cores: int, flags: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(entrance, "usable_cores", lambda: cores)
    config = load_config(flags=flags, environment={}).config
    return entrance.with_front_ends(config, device).frontend_processes


@pytest.mark.parametrize(
    ("device", "cores", "wanted"),
    [("cuda", 1, 0), ("cuda", 3, 1), ("cuda:1", 8, 4), ("cuda", 16, 8), ("cuda", 64, 8), ("cpu", 16, 0)],
)
def test_without_a_number_a_gpu_has_one_for_every_two_cores(
    device: str, cores: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert number(device, cores=cores, flags={}, monkeypatch=monkeypatch) == wanted


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("asked", [0, 12])
def test_what_the_operator_asks_for_is_obeyed(device: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert number(device, cores=4, flags={"frontend_processes": asked}, monkeypatch=monkeypatch) == asked


def test_there_are_none_by_default_where_processes_cannot_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert number("cuda", cores=16, flags={}, monkeypatch=monkeypatch) == 0
