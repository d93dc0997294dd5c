"""Products with AMX against the same in float64; their tiles emulated in plain C, and real where there are any."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from encoder_svc.attention.cpu_kernels import has_amx, has_avx512_bf16
from encoder_svc.models.amx_products import SIGMOIDS, AmxProducts
from encoder_svc.models.ops import ACTIVATIONS, Ops
from tests.tools import require

# Little more than rounding to bfloat16 once, 1.7e-3.
TOLERANCE = 3e-3
# Rows, inputs and outputs: less than a block, no multiple of one, and more than are multiplied at a time.
SIZES = [(1, 32, 32), (33, 48, 20), (300, 100, 168), (40, 1_330, 64), (333, 1_800, 100)]

made = cache(AmxProducts)


@pytest.fixture(params=["emulated", "amx"])
def products(request: pytest.FixtureRequest) -> AmxProducts:
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    if request.param == "amx" and not has_amx():
        pytest.skip("this CPU has no AMX, or its kernel refuses it")
    require("gcc")
    return made("AMX_EMULATED") if request.param == "emulated" else made()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer(num_in: int, num_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(num_out, num_in, seed=seed) * num_in**-0.5, random(num_out, seed=seed + 1)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("add", [False, True], ids=["stored", "added"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_product(products: AmxProducts, sizes: tuple[int, int, int], add: bool) -> None:
    rows, num_in, num_out = sizes
    x, (weight, bias), out = random(rows, num_in, seed=0), layer(num_in, num_out, 1), random(rows, num_out, seed=3)
    wanted = F.linear(x.double(), weight.double(), bias.double()) + add * out.double()
    products.multiply(products.blocks(x), products.panels(weight), bias, out, rows, add=add)
    assert error(out, wanted) < TOLERANCE


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", SIGMOIDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_activated_is_what_the_next_product_reads(
    products: AmxProducts, sizes: tuple[int, int, int], act: str, gated: bool
) -> None:
    rows, num_in, num_inner = sizes
    x, (weight, bias) = random(rows, num_in, seed=0), layer(num_in, num_inner, 1)
    gate_weight, gate_bias = layer(num_in, num_inner, 3)
    down, down_bias = layer(num_inner, 48, 5)
    up = F.linear(x.double(), weight.double(), bias.double())
    gate = F.linear(x.double(), gate_weight.double(), gate_bias.double())
    inner = ACTIVATIONS[act](gate) * up if gated else ACTIVATIONS[act](up)
    panels = products.panels(weight)
    if gated:
        panels = torch.stack([products.panels(gate_weight), panels], dim=1)
    blocks, out = products.empty_blocks(rows, num_inner), torch.empty(rows, 48, dtype=torch.bfloat16)
    products.multiply(
        products.blocks(x),
        panels,
        bias,
        blocks,
        rows,
        gate_bias_O=gate_bias if gated else None,
        act=act,
        in_blocks=True,
    )
    products.multiply(blocks, products.panels(down), down_bias, out, rows)
    assert error(out, F.linear(inner, down.double(), down_bias.double())) < TOLERANCE


@pytest.mark.parametrize("num_in", [64, 1_800])
@pytest.mark.parametrize(("heads", "head_size"), [(2, 64), (16, 72), (4, 80), (3, 16), (5, 36), (1, 128)])
def test_queries_and_keys_are_rotated(products: AmxProducts, heads: int, head_size: int, num_in: int) -> None:
    assert products.rotates(head_size)
    x, (weight, bias) = random(70, num_in, seed=0), layer(num_in, 3 * heads * head_size, 1)
    angles = random(70, head_size // 2, seed=3).float()
    cos, sin = angles.cos(), angles.sin()
    wanted = F.linear(x.double(), weight.double(), bias.double()).unflatten(1, (3, heads, head_size))
    Ops().rotate_(wanted, (cos.double(), sin.double()))
    out_N3HD = torch.empty(70, 3, heads, head_size, dtype=torch.bfloat16)
    products.multiply_rotated(products.blocks(x), products.panels(weight), bias, out_N3HD, cos, sin)
    assert error(out_N3HD, wanted) < TOLERANCE


def test_heads_that_end_with_no_panel_are_not_rotated() -> None:
    assert not AmxProducts.rotates(88)


@pytest.mark.parametrize("num_in", [100, 1_800])
def test_no_bit_depends_on_the_threads_or_on_other_rows(products: AmxProducts, num_in: int) -> None:
    x, (weight, bias) = random(600, num_in, seed=0), layer(num_in, 100, 1)
    panels, threads = products.panels(weight), torch.get_num_threads()

    def multiplied(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), 100, dtype=torch.bfloat16)
        products.multiply(products.blocks(rows), panels, bias, out, len(rows))
        return out

    wanted = multiplied(x)
    try:
        for some in (1, 2, 3):
            torch.set_num_threads(some)
            assert torch.equal(multiplied(x), wanted)
            assert torch.equal(multiplied(x[64:241]), wanted[64:241])
    finally:
        torch.set_num_threads(threads)
