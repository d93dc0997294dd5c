from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from encoder_svc.attention import MMEncoderAttention, PackedSequences, fa4_tiles
from encoder_svc.attention.selfcheck import check, relative_error
from tests.attention import stand_ins
from tests.platforms.machines import cuda

if TYPE_CHECKING:
    from collections.abc import Callable

H100 = 132
FORWARD = "flash_attn.cute.interface._flash_attn_fwd"

# Lengths: microseconds on an H100 with flash-attn 4's own tiles and the smaller ones, 16 heads of 80, by a sweep of
# 2026-11-23.
SWEEP = {
    (1024,): (21.5, 15.9),
    (784, 112): (16.9, 14.1),
    (1152,): (20.1, 29.3),
    (1024,) * 2: (39.2, 29.7),
    (1024,) * 3: (56.9, 43.5),
    (1024,) * 4: (63.1, 60.3),
    (784,) * 8: (83.1, 92.0),
    (1024,) * 16: (242.4, 238.5),
    (784,) * 16: (161.1, 183.9),
    (3844,): (170.2, 181.7),
    (5184,): (299.6, 292.2),
    (3844,) * 8: (1210.6, 1404.9),
    (5184,) * 8: (2017.1, 2425.7),
}


@pytest.mark.parametrize("lengths", SWEEP, ids=lambda lengths: f"{len(lengths)} from {lengths[0]}")
def test_what_is_taken_is_little_slower_than_the_better(lengths: tuple[int, ...]) -> None:
    times = SWEEP[lengths]
    assert times[fa4_tiles.smaller_are_faster(lengths, 16, H100)] <= 1.05 * min(times)


@pytest.mark.parametrize("num_heads", [1, 4, 16, 64, 200])
def test_a_batch_for_its_own_tiles_takes_them(num_heads: int) -> None:
    lengths = fa4_tiles.lengths_of_its_own(num_heads, H100)
    assert len(set(lengths)) > 1
    assert not fa4_tiles.smaller_are_faster(lengths, num_heads, H100)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of flash-attn 4's functions were called, on a machine that says it is an H100."""
    called: list[str] = []

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            called.append(name)
            return function(*args, **kwargs)

        run.__wrapped__ = function  # type: ignore[attr-defined]
        return run

    stand_ins.install(
        monkeypatch,
        {
            "flash_attn.cute": {
                "flash_attn_varlen_func": counted("own", stand_ins.fa4_varlen),
                "flash_attn_func": counted("dense", stand_ins.fa4_dense),
            },
            "flash_attn.cute.interface": {"_flash_attn_fwd": counted("smaller", stand_ins.fa4_forward)},
        },
    )
    monkeypatch.setattr(fa4_tiles, "hopper_multiprocessors", lambda device: H100)
    return called


def _layer(num_heads: int = 16, head_size: int = 80, **options: object) -> MMEncoderAttention:
    return MMEncoderAttention(num_heads, head_size, platform=cuda((9, 0), "flash_attn_4"), dtype="bfloat16", **options)


@pytest.mark.parametrize(("lengths", "called"), [((784, 112), "smaller"), ((1100, 1), "own")])
def test_tiles_follow_the_batch(calls: list[str], lengths: tuple[int, ...], called: str) -> None:
    assert relative_error(_layer(), PackedSequences.of(lengths), "cpu") <= 1e-2
    assert calls == [called]


@pytest.mark.parametrize(("patches", "called"), [(896, "smaller"), (1152, "own")])
def test_where_only_the_device_knows_the_lengths_they_follow_the_patches(
    calls: list[str], patches: int, called: str
) -> None:
    q, k, v = torch.randn(3, patches, 16, 80, dtype=torch.bfloat16).unbind()
    padded = PackedSequences.of((700,)).padded(patches, 17, patches)
    assert padded is not None
    _layer()(q, k, v, *padded)
    assert calls == [called]


@pytest.mark.parametrize("options", [{"head_size": 72}, {"causal": True}, {"num_kv_heads": 8}], ids=str)
def test_what_was_not_measured_keeps_its_own(calls: list[str], options: dict[str, object]) -> None:
    assert relative_error(_layer(**options), PackedSequences.of((784, 112)), "cpu") <= 1e-2
    assert calls == ["own"]


@pytest.mark.parametrize("missing", ["function", "parameter"])
def test_another_release_keeps_its_own(calls: list[str], missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "function":
        monkeypatch.delattr(FORWARD)
    else:
        monkeypatch.setattr(FORWARD, stand_ins.fa4_varlen)
    assert relative_error(_layer(), PackedSequences.of((784, 112)), "cpu") <= 1e-2
    assert calls == ["own"]


def test_the_check_at_start_runs_each_path(calls: list[str]) -> None:
    check(_layer(), "cpu")
    assert calls == ["smaller", "dense", "own"]


def test_other_devices_have_no_hopper_multiprocessors() -> None:
    assert fa4_tiles.hopper_multiprocessors(torch.device("cpu")) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [(1,), (1024,), (784, 112), (1, 7, 64, 65), (1000, 1000, 48)], ids=str)
def test_smaller_tiles_on_this_gpu(lengths: tuple[int, ...]) -> None:
    interface = pytest.importorskip("flash_attn.cute.interface")
    if not fa4_tiles.hopper_multiprocessors(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")
    sequences = PackedSequences.of(lengths).to("cuda")
    q, k, v = torch.randn(3, sum(lengths), 16, 80, device="cuda", dtype=torch.bfloat16).unbind()
    scale = 80**-0.5
    got = fa4_tiles.smaller_tiled(interface._flash_attn_fwd, scale)(q, k, v, sequences.cu_seqlens, max(lengths))
    wanted = interface.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=sequences.cu_seqlens,
        cu_seqlens_k=sequences.cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        softmax_scale=scale,
    )[0]
    assert (got.float() - wanted.float()).norm() <= 5e-3 * wanted.float().norm()
