"""Which class of kernel a name belongs to, and how pages are counted."""

from __future__ import annotations

import mmap

import pytest

from benchmarks.support.kernels import kernel_class, page_faults


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64>>", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norm"),
        ("aten::native_layer_norm", "norm"),
        ("aten::gelu", "activation"),
        ("aten::copy_", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::mul", "elementwise"),
        ("cpu_kernels::attend", "attention"),
        ("amx_products::gemm", "matrix products"),
        ("amx_products::copy_to_blocks", "copies"),
        ("cpu_kernels::attend_amx", "attention"),
        ("cpu_kernels::rotate", "rotary"),
        ("cpu_kernels::gate", "activation"),
        ("cpu_kernels::rms_norm", "norm"),
        ("cpu_kernels::layer_norm", "norm"),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, label: str) -> None:
    assert kernel_class(name) == label


def test_pages_that_are_touched_first_are_counted() -> None:
    num_pages = 5_000

    def touch() -> None:
        with mmap.mmap(-1, num_pages * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(num_pages):
                memory[page * mmap.PAGESIZE] = 1

    assert num_pages <= page_faults(touch) < 2 * num_pages
    assert page_faults(lambda: None) < num_pages
