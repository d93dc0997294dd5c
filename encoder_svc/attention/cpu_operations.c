// What lies between an encoder's matrix products, one pass each, for CPUs with AVX512-BF16.

#include "cpu_vectors.h"

// x · sigmoid(slope · x) in place.
void gate(bf16 *x, int64_t count, float slope, int threads) {
    const __m512 one = _mm512_set1_ps(1), factor = _mm512_set1_ps(-slope * LOG2_E);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 value = load(x + i, lanes);
        const __m512 sigmoid = _mm512_rcp14_ps(_mm512_add_ps(one, exp2_of(_mm512_mul_ps(factor, value))));
        store(x + i, lanes, _mm512_mul_ps(value, sigmoid));
    }
}

// The squares of a row's values less mean, added up.
INLINE float squares_of(const bf16 *row, int size, float mean) {
    const __m512 means = _mm512_set1_ps(mean);
    __m512 squares = _mm512_setzero_ps();
    for (int c = 0; c < size; c += LANES) {
        const __mmask16 lanes = first_lanes(size - c);
        const __m512 value = _mm512_maskz_sub_ps(lanes, load(row + c, lanes), means);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    return _mm512_reduce_add_ps(squares);
}

INLINE float sum_of(const bf16 *row, int size) {
    __m512 sum = _mm512_setzero_ps();
    for (int c = 0; c < size; c += LANES) sum = _mm512_add_ps(sum, load(row + c, first_lanes(size - c)));
    return _mm512_reduce_add_ps(sum);
}

// A row's value c in out, which is [N, C] or in blocks; and how far a row reaches there.
INLINE bf16 *place(bf16 *out, int64_t row, int c, int size, int blocks) {
    return out + (blocks ? in_blocks(row, c / BLOCK, (size + BLOCK - 1) / BLOCK) + c % BLOCK : row * size + c);
}

INLINE int reach(int size, int blocks) { return blocks ? in_whole(size, BLOCK) : size; }

// RMSNorm of each row of x [N, C].
void rms_norm(const bf16 *x, bf16 *out, const bf16 *weight, float eps, int64_t patches, int size, int blocks,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < patches; n++) {
        const bf16 *row = x + n * size;
        const __m512 scale = _mm512_set1_ps(1 / sqrtf(squares_of(row, size, 0) / size + eps));
        for (int c = 0; c < reach(size, blocks); c += LANES) {
            const __mmask16 lanes = first_lanes(size - c);
            const __m512 normed = _mm512_mul_ps(load(row + c, lanes), scale);
            store(place(out, n, c, size, blocks), blocks ? 0xFFFF : lanes,
                  _mm512_mul_ps(normed, load(weight + c, lanes)));
        }
    }
}

// LayerNorm of each row of x [N, C].
void layer_norm(const bf16 *x, bf16 *out, const bf16 *weight, const bf16 *bias, float eps, int64_t patches, int size,
                int blocks, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < patches; n++) {
        const bf16 *row = x + n * size;
        const float mean = sum_of(row, size) / size;
        const __m512 means = _mm512_set1_ps(mean);
        const __m512 scale = _mm512_set1_ps(1 / sqrtf(squares_of(row, size, mean) / size + eps));
        for (int c = 0; c < reach(size, blocks); c += LANES) {
            const __mmask16 lanes = first_lanes(size - c);
            const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(row + c, lanes), means), scale);
            store(place(out, n, c, size, blocks), blocks ? 0xFFFF : lanes,
                  _mm512_fmadd_ps(normed, load(weight + c, lanes), load(bias + c, lanes)));
        }
    }
}

// Rotates the heads of x [N, heads, D] in place: halves of a head are the pairs. cos and sin are float [N, D / 2].
void rotate(bf16 *x, int64_t stride, const float *cos, const float *sin, int64_t patches, int heads, int head_size,
            int threads) {
    const int half = head_size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < patches; n++)
        for (int d = 0; d < half; d += LANES) {
            const __mmask16 lanes = first_lanes(half - d);
            const __m512 c = _mm512_maskz_loadu_ps(lanes, cos + n * half + d);
            const __m512 s = _mm512_maskz_loadu_ps(lanes, sin + n * half + d);
            for (int head = 0; head < heads; head++) {
                bf16 *at = x + n * stride + head * head_size + d;
                const __m512 first = load(at, lanes), second = load(at + half, lanes);
                store(at, lanes, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
                store(at + half, lanes, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
            }
        }
}
