"""What the matrix products of models/ops_quack.py do to a sum before it is stored. Imported only by it, for it needs
quack-kernels and nvidia-cutlass-dsl.

Each function is traced once for one value of the sum, ``acc``, in float32, or for two neighbours of a row where it
unpacks them; the other arguments are what its ``ops`` load for that value's row or column.
"""

# The kernels' language has its own semantics and no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

from cutlass import cute
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import ColVecLoad, RowVecLoad, Scalar

# Adding and taking away 1.5 · 2²³ rounds a float32 to the nearest integer.
_ROUNDING = 12582912.0
_TURN = 6.283185307179586


# The normed product, of rows as they are and weights that have the norm inside, is (acc + shifts) · scale + bias.
_NORM = {"scale": ColVecLoad("scale"), "shifts": RowVecLoad("shifts"), "bias": RowVecLoad("bias")}
# One vector of turns, signed: one for rows and one for columns would not leave the epilogue its registers.
_ROTATION = {
    "half_sum": ColVecLoad("half_sum"),
    "half_difference": ColVecLoad("half_difference"),
    "turns": RowVecLoad("turns"),
}


def _rotated(pair, half_sum, half_difference, turns):
    """Two neighbours rotated by row · turns whole turns or, where these are negative, by column · -turns."""
    first, second = unpack(pair)
    turn, _ = unpack(turns)
    turns = cute.math.fma(half_difference, turn, half_sum * cute.math.absf(turn))
    # Less than half a turn, where the GPU's own sine and cosine are exact to 2⁻²⁰.
    nearest = cute.math.fma(turns, 1.0, _ROUNDING) - _ROUNDING
    angle = (turns - nearest) * _TURN
    sin = cute.math.sin(angle, fastmath=True)
    cos = cute.math.cos(angle, fastmath=True)
    return pack(first * cos - second * sin, second * cos + first * sin)


@gemm_epilogue(ops=_NORM | _ROTATION, mode="acc_pair")
def rotated(acc, scale, shifts, bias, half_sum, half_difference, turns):
    """The normed product, rotated."""
    return {"D": _rotated((acc + shifts) * scale + bias, half_sum, half_difference, turns)}


@gemm_epilogue()
def added(acc, c):
    """c + acc."""
    return {"D": acc + c}


# By the names of Hugging Face configs.


def _sigmoid_of_twice(x):
    """½ tanh(x) + ½, where tanh is one instruction."""
    return 0.5 * cute.math.tanh(x, fastmath=True) + 0.5


def _inside_gelu(x):
    """What GELU's approximation takes tanh of (Hendrycks and Gimpel, 2016)."""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@gemm_epilogue(ops=_NORM)
def quick_gelu(acc, scale, shifts, bias):
    """x sigmoid(1.702 x) of the normed product, x."""
    x = (acc + shifts) * scale + bias
    return {"D": x * _sigmoid_of_twice(0.851 * x)}


@gemm_epilogue(ops=_NORM)
def gelu_pytorch_tanh(acc, scale, shifts, bias):
    """GELU by its approximation with tanh."""
    x = (acc + shifts) * scale + bias
    return {"D": x * _sigmoid_of_twice(_inside_gelu(x))}


@gemm_epilogue(ops=_NORM)
def gelu(acc, scale, shifts, bias):
    """GELU by the error function."""
    x = (acc + shifts) * scale + bias
    return {"D": 0.5 * x * (1.0 + cute.math.erf(0.7071067811865476 * x, fastmath=True))}


@gemm_epilogue(ops=_NORM)
def silu(acc, scale, shifts, bias):
    """x sigmoid(x) of the normed product, x."""
    x = (acc + shifts) * scale + bias
    return {"D": x * _sigmoid_of_twice(0.5 * x)}


@gemm_epilogue(outputs=("gated",), ops=_NORM, mode="acc_pair")
def silu_gated(acc, scale, shifts, bias):
    """silu(gate) · up of neighbours (gate, up) of the normed product: half as many columns (Shazeer, 2020)."""
    gate, up = unpack((acc + shifts) * scale + bias)
    return {"gated": gate * _sigmoid_of_twice(0.5 * gate) * up}


# The same of products on e4m3: ``rows`` and ``columns`` are the scales of the input's rows and of the weights'.
_SCALES = {"rows": ColVecLoad("rows"), "columns": RowVecLoad("columns"), "bias": RowVecLoad("bias")}


@gemm_epilogue(ops=_SCALES | _ROTATION, mode="acc_pair")
def scaled_rotated(acc, rows, columns, bias, half_sum, half_difference, turns):
    """:func:`rotated`."""
    return {"D": _rotated(acc * columns * rows + bias, half_sum, half_difference, turns)}


# What the MLP's last product reads, itself on e4m3: ``shrink`` keeps it in e4m3's range.
_SHRUNK = _SCALES | {"shrink": Scalar("shrink")}


@gemm_epilogue(ops=_SHRUNK)
def scaled_quick_gelu(acc, rows, columns, bias, shrink):
    """:func:`quick_gelu`."""
    x = acc * columns * rows + bias
    return {"D": x * shrink * _sigmoid_of_twice(0.851 * x)}


@gemm_epilogue(ops=_SHRUNK)
def scaled_gelu_pytorch_tanh(acc, rows, columns, bias, shrink):
    """:func:`gelu_pytorch_tanh`."""
    x = acc * columns * rows + bias
    inner = _inside_gelu(x)
    return {"D": x * shrink * _sigmoid_of_twice(inner)}


@gemm_epilogue(ops={"columns": RowVecLoad("columns")})
def scaled_added(acc, c, columns):
    """:func:`added`."""
    return {"D": acc * columns + c}


@gemm_epilogue(outputs=("gated",), ops=_SCALES, mode="acc_pair")
def scaled_silu_gated(acc, rows, columns, bias):
    """:func:`silu_gated`."""
    gate, up = unpack(acc * columns * rows + bias)
    return {"gated": gate * _sigmoid_of_twice(0.5 * gate) * up}
