// What the kernels for CPUs share: vectors of 16 floats, made of bfloat16 and stored as such.
//
// Tensors are bfloat16 unless they say float; strides count values. Numbers are kept in float between a load and a
// store. Shapes: N patches, H heads, D head_size, C values of a row.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define LOG2_E 1.44269504f

enum {
    LANES = 16,                      // floats of a vector
    BLOCK = 2 * LANES,               // rows of a block, and values of a row in it
    BLOCK_VALUES = BLOCK * BLOCK,
};

#define INLINE static inline __attribute__((always_inline))

INLINE int least(int a, int b) { return a < b ? a : b; }

INLINE int in_whole(int count, int unit) { return (count + unit - 1) / unit * unit; }

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

INLINE __m512 load(const bf16 *from, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

INLINE void store(bf16 *to, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

// 2^x: the cubic of least relative error for what x is above its floor, off by 7.5e-5; rounding to bfloat16 is off by up
// to 2e-3.
INLINE __m512 exp2_of(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_set1_ps(7.8024525e-2f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.2606716e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9583354e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.9992521e-1f));
    return _mm512_scalef_ps(sum, x);
}

// Where a row's 32 values of a step lie in blocks [rows / 32][steps][32 rows][32 values], the layout of what AMX
// multiplies. Values after a row's last are zeros.
INLINE int64_t in_blocks(int64_t row, int step, int num_steps) {
    return (row / BLOCK * num_steps + step) * BLOCK_VALUES + row % BLOCK * BLOCK;
}
