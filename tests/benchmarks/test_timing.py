"""Sides take turns, and a slow machine stops early."""

from __future__ import annotations

import time

import torch

from benchmarks.support.timing import interleave

CPU = torch.device("cpu")


def test_sides_take_turns_there_and_back_after_one_round_of_warm_up() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in ("ours", "theirs")}
    times_s = interleave(sides, CPU, rounds=4, budget_s=60)
    assert calls == ["ours", "theirs"] + ["ours", "theirs", "theirs", "ours"] * 2
    assert [len(times) for times in times_s.values()] == [4, 4]


def test_four_rounds_are_run_even_where_the_time_is_spent() -> None:
    times_s = interleave({"slow": lambda: time.sleep(0.01)}, CPU, rounds=20, budget_s=0)
    assert len(times_s["slow"]) == 4
    assert min(times_s["slow"]) >= 0.01
