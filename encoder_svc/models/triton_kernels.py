"""The Triton kernels of models/ops_triton.py. Imported only by it, for they need Triton.

Every one is bound by memory: it reads each value once, computes in float32 and writes each result once.
"""

# Triton's language has its own semantics and no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def centre(patches_ptr, out_ptr, num_values: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """uint8 rows to (x - 128) / 128, zeros beyond ``num_values``. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    x = tl.load(patches_ptr + row * num_values + columns, columns < num_values).to(tl.float32)
    x = tl.where(columns < num_values, (x - 128) / 128, 0.0)
    tl.store(out_ptr + row * width + columns, x.to(out_ptr.dtype.element_ty), columns < width)


@triton.jit
def norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    eps,
    width: tl.constexpr,
    is_layer_norm: tl.constexpr,
    has_shift: tl.constexpr,
    quantise: tl.constexpr,
    largest: tl.constexpr,
    block: tl.constexpr,
    starts_early: tl.constexpr,
):
    """LayerNorm or RMSNorm of x + shift; quantised by row where asked. Grid: any number of programs; each keeps the
    weights and takes every so many rows. One that starts early reads the weights, which nothing writes, while what
    writes x still runs, and lets the next do likewise."""
    columns = tl.arange(0, block)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
    if is_layer_norm:
        bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    if has_shift:
        shift = tl.load(shift_ptr + columns, inside, 0.0)
    if starts_early:
        gdc_launch_dependents()
        gdc_wait()
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + columns
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
        if has_shift:
            x += shift
        if is_layer_norm:
            x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight
        if is_layer_norm:
            y += bias
        if quantise:
            scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / largest
            tl.store(scale_ptr + row, scale)
            y *= 1 / scale
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def row_scales(
    x_ptr,
    shift_ptr,
    out_ptr,
    num_rows,
    eps,
    width: tl.constexpr,
    is_layer_norm: tl.constexpr,
    has_shift: tl.constexpr,
    block: tl.constexpr,
    starts_early: tl.constexpr,
):
    """One over the deviation of x + shift, or over its root mean square. Grid and ``starts_early``: as of the norm."""
    columns = tl.arange(0, block)
    inside = columns < width
    if has_shift:
        shift = tl.load(shift_ptr + columns, inside, 0.0)
    if starts_early:
        gdc_launch_dependents()
        gdc_wait()
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + tl.cast(row, tl.int64) * width + columns, inside, 0.0).to(tl.float32)
        if has_shift:
            x += shift
        if is_layer_norm:
            x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        tl.store(out_ptr + row, tl.rsqrt(tl.sum(x * x, 0) / width + eps))


@triton.jit
def rotate(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    num_heads: tl.constexpr,
    half: tl.constexpr,
    block_heads: tl.constexpr,
    block: tl.constexpr,
):
    """Rotates q and k of packed qkv rows in place. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, block_heads)[:, None]
    columns = tl.arange(0, block)[None, :]
    inside = (heads < 2 * num_heads) & (columns < half)
    cos = tl.load(cos_ptr + row * half + columns, columns < half, 0.0)
    sin = tl.load(sin_ptr + row * half + columns, columns < half, 0.0)
    first_ptr = qkv_ptr + row * row_stride + heads * (2 * half) + columns
    first = tl.load(first_ptr, inside, 0.0).to(tl.float32)
    second = tl.load(first_ptr + half, inside, 0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), inside)
    tl.store(first_ptr + half, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), inside)


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _act(x, act: tl.constexpr):
    if act == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif act == "silu":
        x = x * tl.sigmoid(x)
    elif act == "gelu_pytorch_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif act == "gelu":
        x = _erf_gelu(x)
    return x


@triton.jit
def activate(
    x_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    width: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    act: tl.constexpr,
    quantise: tl.constexpr,
    largest: tl.constexpr,
    block: tl.constexpr,
):
    """act(x + bias), or act(gate) * up where x holds a row of gate values and then one of up values; quantised by row
    where asked. Grid: any number of programs."""
    columns = tl.arange(0, block)
    inside = columns < width
    if has_bias:
        bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
        if gated:
            up_bias = tl.load(bias_ptr + width + columns, inside, 0.0).to(tl.float32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        if gated:
            y = tl.load(x_ptr + 2 * start + columns, inside, 0.0).to(tl.float32)
            up = tl.load(x_ptr + 2 * start + width + columns, inside, 0.0).to(tl.float32)
            if has_bias:
                y += bias
                up += up_bias
            y = _act(y, act) * up
        else:
            y = tl.load(x_ptr + start + columns, inside, 0.0).to(tl.float32)
            if has_bias:
                y += bias
            y = _act(y, act)
        if quantise:
            scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / largest
            tl.store(scale_ptr + row, scale)
            y *= 1 / scale
        tl.store(out_ptr + start + columns, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def add_interpolated(
    hidden_ptr,
    table_ptr,
    indices_ptr,
    weights_ptr,
    width: tl.constexpr,
    corners: tl.constexpr,
    block: tl.constexpr,
):
    """hidden += the weighted sum of a few rows of a table. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    total = tl.zeros([block], tl.float32)
    for corner in tl.static_range(corners):
        index = tl.load(indices_ptr + row * corners + corner)
        weight = tl.load(weights_ptr + row * corners + corner)
        total += weight * tl.load(table_ptr + index * width + columns, inside, 0.0).to(tl.float32)
    element = hidden_ptr.dtype.element_ty
    at = hidden_ptr + row * width + columns
    hidden = tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(at, (hidden + total.to(element).to(tl.float32)).to(element), inside)
