// Kernels for CPUs with AVX512-BF16 and no AMX. cpu_kernels.py compiles them where they run.
//
// torch's libraries hold the OpenMP runtime that the pragmas call, so that its threads are the ones that work here.
//
// Tensors are bfloat16 unless they say float; strides count values. Numbers are kept in float between a load and a
// store. Shapes: N patches, H heads, D head_size, C values of a row.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define LOG2_E 1.44269504f
#define LOWEST -1e30f  // a score that weighs nothing; not infinite, for infinity less infinity is no number

enum {
    LANES = 16,           // floats of a vector
    MAX_HEAD_SIZE = 128,
    ROWS = 5, VECTORS = 5,               // of a product that stays in registers: 25 sums, 5 weights, 1 factor
    PANEL = VECTORS * LANES,             // keys that are multiplied together
    KEYS = 4 * PANEL,                    // keys between two updates of the running softmax
    QUERIES = 8 * ROWS,                  // whose scores against KEYS lie in the nearest cache
    CHUNK = 512,                         // queries for which keys are laid out once; their sums lie in the second cache
};

#define INLINE static inline __attribute__((always_inline))

INLINE int least(int a, int b) { return a < b ? a : b; }

INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xFFFF : (__mmask16)((1u << count) - 1); }

INLINE __m512 load(const bf16 *from, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

INLINE void store(bf16 *to, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

// 2^x, by its Taylor polynomial for the fraction: off by 4e-6 at most, a hundredth of what bfloat16 rounds away.
INLINE __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.3333558e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

// sums[rows][16 vectors] (+)= factors[rows][2 pairs] · weights[pairs][16 vectors][2]; a pair is two neighbours in
// bfloat16, which one instruction multiplies and adds up.
INLINE void multiply_in_registers(const int rows, const int vectors, int pairs, const bf16 *factors, int factors_stride,
                                  const bf16 *weights, int weights_stride, float *sums, int sums_stride, int add) {
    __m512 kept[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            kept[r][v] = add ? _mm512_loadu_ps(sums + r * sums_stride + v * LANES) : _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++) {
        __m512bh weight[VECTORS];
        for (int v = 0; v < vectors; v++)
            weight[v] = (__m512bh)_mm512_loadu_si512(weights + (intptr_t)p * weights_stride + v * 2 * LANES);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, factors + r * factors_stride + 2 * p, sizeof pair);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < vectors; v++) kept[r][v] = _mm512_dpbf16_ps(kept[r][v], factor, weight[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + r * sums_stride + v * LANES, kept[r][v]);
}

#define CASE(R, V)                                                                                             \
    case R * 8 + V:                                                                                            \
        multiply_in_registers(R, V, pairs, factors, factors_stride, weights, weights_stride, sums, sums_stride, \
                              add);                                                                            \
        break;
#define CASES(R) CASE(R, 1) CASE(R, 2) CASE(R, 3) CASE(R, 4) CASE(R, 5)

static void multiply(int rows, int vectors, int pairs, const bf16 *factors, int factors_stride, const bf16 *weights,
                     int weights_stride, float *sums, int sums_stride, int add) {
    switch (rows * 8 + vectors) { CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) }
}

// 16 keys' values 2p and 2p + 1 side by side, for 16 pairs p: a transposition of 32-bit words.
INLINE void transpose(__m512i word[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(word[i], word[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(word[i], word[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            word[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            word[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(word[i + j], word[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(word[i + j], word[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        word[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        word[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Keys as panels [D / 2][PANEL][2], zeros after the last.
static void lay_out_keys(const bf16 *keys, int64_t stride, int count, int head_size, bf16 *panels) {
    for (int key = 0; key < count; key += LANES) {
        bf16 *panel = panels + (key / PANEL) * PANEL * head_size + key % PANEL * 2;
        for (int pair = 0; pair < head_size / 2; pair += LANES) {
            const __mmask16 lanes = first_lanes(head_size / 2 - pair);
            __m512i word[LANES];
            for (int i = 0; i < LANES; i++)
                word[i] = key + i < count ? _mm512_maskz_loadu_epi32(lanes, keys + (key + i) * stride + 2 * pair)
                                          : _mm512_setzero_si512();
            transpose(word);
            for (int i = 0; i < least(LANES, head_size / 2 - pair); i++)
                _mm512_storeu_si512(panel + (pair + i) * 2 * PANEL, word[i]);
        }
    }
}

// Values as [keys / 2][D, in whole vectors][2], zeros after the last.
static void lay_out_values(const bf16 *values, int64_t stride, int count, int head_size, bf16 *pairs,
                           int pairs_stride) {
    for (int key = 0; key < count; key += 2)
        for (int d = 0; d < head_size; d += LANES) {
            const __mmask16 lanes = first_lanes(head_size - d);
            const bf16 *at = values + key * stride + d;
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at));
            const __mmask16 odd_lanes = key + 1 < count ? lanes : 0;
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_lanes, at + stride));
            _mm512_storeu_si512(pairs + (intptr_t)(key / 2) * pairs_stride + 2 * d,
                                _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// One row's scores to weights 2^(factor · score - greatest), and what that changes of the rows' running softmax.
INLINE void weigh(float *scores, int count, float factor, bf16 *weights, float *greatest, float *total, float *sums,
                  int sums_count) {
    const int padded = (count + LANES - 1) / LANES * LANES;
    __m512 highest = _mm512_set1_ps(LOWEST);
    _mm512_mask_storeu_ps(scores + padded - LANES, (__mmask16)~first_lanes(count - padded + LANES), highest);
    for (int i = 0; i < padded; i += LANES) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + i));
    const float before = *greatest, now = _mm512_reduce_max_ps(highest) * factor;
    if (now > before) {
        const __m512 shrink = exp2_of(_mm512_set1_ps(before - now));
        for (int i = 0; i < sums_count; i += LANES)
            _mm512_storeu_ps(sums + i, _mm512_mul_ps(shrink, _mm512_loadu_ps(sums + i)));
        *total *= _mm512_cvtss_f32(shrink);
        *greatest = now;
    }
    const __m512 factors = _mm512_set1_ps(factor), offset = _mm512_set1_ps(*greatest);
    __m512 added = _mm512_setzero_ps();
    for (int i = 0; i < padded; i += LANES) {
        const __m512 weight = exp2_of(_mm512_fmsub_ps(factors, _mm512_loadu_ps(scores + i), offset));
        added = _mm512_add_ps(added, weight);
        _mm256_storeu_si256((__m256i *)(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    *total += _mm512_reduce_add_ps(added);
}

// Up to CHUNK queries of one head against all keys of their sequence.
static void attend_chunk(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t q_stride, int64_t k_stride,
                         int64_t v_stride, int64_t out_stride, int num_queries, int num_keys, int head_size,
                         float factor) {
    _Alignas(64) bf16 keys[KEYS * MAX_HEAD_SIZE], values[KEYS * MAX_HEAD_SIZE], queries[CHUNK * MAX_HEAD_SIZE];
    _Alignas(64) bf16 weights[QUERIES * KEYS];
    _Alignas(64) float scores[QUERIES * KEYS], sums[CHUNK * MAX_HEAD_SIZE];
    float greatest[CHUNK], total[CHUNK];
    const int width = (head_size + LANES - 1) / LANES * LANES;
    for (int row = 0; row < num_queries; row++) {
        memcpy(queries + row * head_size, q + row * q_stride, head_size * sizeof(bf16));
        greatest[row] = LOWEST;
        total[row] = 0;
    }
    memset(sums, 0, sizeof(float) * num_queries * width);
    for (int first_key = 0; first_key < num_keys; first_key += KEYS) {
        const int count = least(KEYS, num_keys - first_key);
        lay_out_keys(k + first_key * k_stride, k_stride, count, head_size, keys);
        lay_out_values(v + first_key * v_stride, v_stride, count, head_size, values, 2 * width);
        for (int first = 0; first < num_queries; first += QUERIES) {
            const int block = least(QUERIES, num_queries - first);
            for (int key = 0; key < count; key += PANEL)
                for (int row = 0; row < block; row += ROWS)
                    multiply(least(ROWS, block - row), least(VECTORS, (count - key + LANES - 1) / LANES), head_size / 2,
                             queries + (first + row) * head_size, head_size, keys + key * head_size, 2 * PANEL,
                             scores + row * KEYS + key, KEYS, 0);
            for (int row = 0; row < block; row++)
                weigh(scores + row * KEYS, count, factor, weights + row * KEYS, greatest + first + row,
                      total + first + row, sums + (first + row) * width, width);
            for (int d = 0; d < width; d += PANEL)
                for (int row = 0; row < block; row += ROWS)
                    multiply(least(ROWS, block - row), least(VECTORS, (width - d) / LANES), (count + 1) / 2,
                             weights + row * KEYS, KEYS, values + 2 * d, 2 * width, sums + (first + row) * width + d,
                             width, 1);
        }
    }
    for (int row = 0; row < num_queries; row++) {
        const __m512 scale = _mm512_set1_ps(1 / total[row]);
        for (int d = 0; d < head_size; d += LANES)
            store(out + row * out_stride + d, first_lanes(head_size - d),
                  _mm512_mul_ps(scale, _mm512_loadu_ps(sums + row * width + d)));
    }
}

INLINE int chunks_of(const int32_t *bounds, int sequence) {
    return (bounds[sequence + 1] - bounds[sequence] + CHUNK - 1) / CHUNK;
}

// Bidirectional attention within each sequence. q, k, v and out are [N, H, D], a head's values side by side and heads
// too; strides are those of patches. bounds [sequences + 1] are the sequences' boundaries. D is even.
void attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t q_stride, int64_t k_stride,
            int64_t v_stride, int64_t out_stride, const int32_t *bounds, int sequences, int heads, int head_size,
            float scale, int threads) {
    int chunks = 0;
    for (int i = 0; i < sequences; i++) chunks += chunks_of(bounds, i);
    const float factor = scale * LOG2_E;
#pragma omp parallel num_threads(threads)
    {
        int sequence = 0, first_chunk = 0;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < chunks * heads; item++) {
            // A thread's items come in ascending order.
            while (item >= (first_chunk + chunks_of(bounds, sequence)) * heads)
                first_chunk += chunks_of(bounds, sequence++);
            const int64_t start = bounds[sequence], stop = bounds[sequence + 1];
            const int of_sequence = item - first_chunk * heads;
            const int64_t first = start + of_sequence / heads * CHUNK;
            const int column = of_sequence % heads * head_size;
            attend_chunk(q + first * q_stride + column, k + start * k_stride + column, v + start * v_stride + column,
                         out + first * out_stride + column, q_stride, k_stride, v_stride, out_stride,
                         least(CHUNK, stop - first), stop - start, head_size, factor);
        }
    }
}

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

// RMSNorm of each row of x [N, C].
void rms_norm(const bf16 *x, bf16 *out, const bf16 *weight, float eps, int64_t patches, int size, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < patches; n++) {
        const bf16 *row = x + n * size;
        __m512 squares = _mm512_setzero_ps();
        for (int c = 0; c < size; c += LANES) {
            const __m512 value = load(row + c, first_lanes(size - c));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
        for (int c = 0; c < size; c += LANES) {
            const __mmask16 lanes = first_lanes(size - c);
            const __m512 normed = _mm512_mul_ps(load(row + c, lanes), scale);
            store(out + n * size + c, lanes, _mm512_mul_ps(normed, load(weight + c, lanes)));
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
