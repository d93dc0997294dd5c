// Attention in AVX512-BF16, for CPUs without AMX.

#include "cpu_attention.h"

enum {
    MAX_HEAD_SIZE = 128,
    ROWS = 5, VECTORS = 5,               // of a product that stays in registers: 25 sums, 5 weights, 1 factor
    PANEL = VECTORS * LANES,             // keys that are multiplied together
    KEYS = 4 * PANEL,                    // keys between two updates of the running softmax
    QUERIES = 8 * ROWS,                  // whose scores against KEYS lie in the nearest cache
    CHUNK = 512,                         // queries for which keys are laid out once; their sums lie in the second cache
};

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

// Keys as panels [D / 2][PANEL][2], zeros after the last.
static void lay_out_keys(const bf16 *keys, int64_t stride, int count, int head_size, bf16 *panels) {
    for (int key = 0; key < count; key += LANES) {
        bf16 *panel = panels + (key / PANEL) * PANEL * head_size + key % PANEL * 2;
        for (int pair = 0; pair < head_size / 2; pair += LANES) {
            __m512i word[LANES];
            load_pairs(keys + key * stride, stride, count - key, head_size, pair, word);
            for (int i = 0; i < least(LANES, head_size / 2 - pair); i++)
                _mm512_storeu_si512(panel + (pair + i) * 2 * PANEL, word[i]);
        }
    }
}

// Values as [keys / 2][D, in whole vectors][2], zeros after the last.
static void lay_out_values(const bf16 *values, int64_t stride, int count, int head_size, bf16 *pairs, int pairs_stride) {
    for (int key = 0; key < count; key += 2)
        for (int d = 0; d < head_size; d += LANES)
            _mm512_storeu_si512(pairs + (intptr_t)(key / 2) * pairs_stride + 2 * d,
                                two_rows(values + key * stride + d, stride, count - key, first_lanes(head_size - d)));
}

// One row's scores to weights 2^(factor · score - greatest), zeros up to whole pairs of vectors, and what that changes
// of the row's running softmax.
static void weigh(float *scores, int count, float factor, bf16 *weights, float *greatest, float *total, float *sums,
                  int sums_count) {
    const int padded = in_whole(count, 2 * LANES);
    const __m512 lowest = _mm512_set1_ps(LOWEST);
    __m512 highest = lowest, other = lowest;
    for (int i = count / LANES * LANES; i < padded; i += LANES)
        _mm512_mask_storeu_ps(scores + i, (__mmask16)~first_lanes(count - i), lowest);
    for (int i = 0; i < padded; i += 2 * LANES) {
        highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + i));
        other = _mm512_max_ps(other, _mm512_loadu_ps(scores + i + LANES));
    }
    const float before = *greatest, now = _mm512_reduce_max_ps(_mm512_max_ps(highest, other)) * factor;
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

// The queries' weighted sums, divided by the total of their weights.
static void store_chunk(Chunk chunk, const float *sums, int sums_stride, const float *total) {
    for (int row = 0; row < chunk.num_queries; row++) {
        const __m512 scale = _mm512_set1_ps(1 / total[row]);
        for (int d = 0; d < chunk.head_size; d += LANES)
            store(chunk.out + row * chunk.out_stride + d, first_lanes(chunk.head_size - d),
                  _mm512_mul_ps(scale, _mm512_loadu_ps(sums + row * sums_stride + d)));
    }
}

static void attend_chunk(Chunk c) {
    // Not on the stack, which may be small (OMP_STACKSIZE).
    static _Thread_local _Alignas(64) bf16 keys[KEYS * MAX_HEAD_SIZE], values[KEYS * MAX_HEAD_SIZE];
    static _Thread_local _Alignas(64) bf16 queries[CHUNK * MAX_HEAD_SIZE], weights[QUERIES * KEYS];
    static _Thread_local _Alignas(64) float scores[QUERIES * KEYS], sums[CHUNK * MAX_HEAD_SIZE];
    float greatest[CHUNK], total[CHUNK];
    const int head_size = c.head_size, width = in_whole(head_size, LANES);
    for (int row = 0; row < c.num_queries; row++) {
        memcpy(queries + row * head_size, c.q + row * c.q_stride, head_size * sizeof(bf16));
        greatest[row] = LOWEST;
        total[row] = 0;
    }
    for (int first_key = 0; first_key < c.num_keys; first_key += KEYS) {
        const int count = least(KEYS, c.num_keys - first_key);
        lay_out_keys(c.k + first_key * c.k_stride, c.k_stride, count, head_size, keys);
        lay_out_values(c.v + first_key * c.v_stride, c.v_stride, count, head_size, values, 2 * width);
        for (int first = 0; first < c.num_queries; first += QUERIES) {
            const int block = least(QUERIES, c.num_queries - first);
            for (int key = 0; key < count; key += PANEL)
                for (int row = 0; row < block; row += ROWS)
                    multiply(least(ROWS, block - row), least(VECTORS, (count - key + LANES - 1) / LANES), head_size / 2,
                             queries + (first + row) * head_size, head_size, keys + key * head_size, 2 * PANEL,
                             scores + row * KEYS + key, KEYS, 0);
            for (int row = 0; row < block; row++)
                weigh(scores + row * KEYS, count, c.factor, weights + row * KEYS, greatest + first + row,
                      total + first + row, sums + (first + row) * width, first_key ? width : 0);
            for (int d = 0; d < width; d += PANEL)
                for (int row = 0; row < block; row += ROWS)
                    multiply(least(ROWS, block - row), least(VECTORS, (width - d) / LANES), (count + 1) / 2,
                             weights + row * KEYS, KEYS, values + 2 * d, 2 * width, sums + (first + row) * width + d,
                             width, first_key > 0);
        }
    }
    store_chunk(c, sums, width, total);
}

static void nothing(void) {}

// Bidirectional attention within each sequence; see over_chunks.
void attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t q_stride, int64_t k_stride,
            int64_t v_stride, int64_t out_stride, const int32_t *bounds, int sequences, int heads, int head_size,
            float scale, int threads) {
    const Chunk all = {.q = q, .k = k, .v = v, .out = out, .q_stride = q_stride, .k_stride = k_stride,
                       .v_stride = v_stride, .out_stride = out_stride, .head_size = head_size,
                       .factor = scale * LOG2_E};
    over_chunks(all, bounds, sequences, heads, CHUNK, threads, nothing, attend_chunk, nothing);
}
