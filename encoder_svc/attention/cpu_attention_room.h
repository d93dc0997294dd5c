// Where AMX's attention works, how queries, keys and values are laid out there, and how its sums are written.

#pragma once

#include "cpu_attention.h"
#include "cpu_tiles.h"

enum {
    STEP = 2 * TILE_PAIRS,               // values of a query that one product of tiles takes
    KEYS = 2 * TILE_ROWS,                // whose scores become weights together
    MAX_SUMS = 5,                        // tiles that stay, of 16 values of a head
    MAX_WIDTH = MAX_SUMS * TILE_ROWS,
    MAX_STEPS = (MAX_WIDTH + STEP - 1) / STEP,
    TILE_FLOATS = TILE_ROWS * LANES,
    KEPT_KEYS = 1024,                    // laid out at a time: they lie in the second cache
    CHUNK = 1024,                        // most queries for which keys are laid out once
    LEAST_CHUNK = 256,                   // about the fewest, where there are more threads than work
    LAYING_OUT = 128,                    // queries that could be attended to instead of laying out keys and values
};

// What a thread works in. Zeros after a head's last value, the last key and the last query.
typedef struct {
    _Alignas(64) bf16 queries[CHUNK * MAX_STEPS * STEP];   // [queries / 16][steps][16 pairs][16 queries][2]
    bf16 keys[KEPT_KEYS * MAX_STEPS * STEP];               // [keys / 16][steps][16 keys][32]
    bf16 values[KEPT_KEYS * MAX_WIDTH];                    // [keys / 32][D / 16][16 values][32 keys]
    float sums[CHUNK * MAX_WIDTH];                         // [queries / 16][D / 16][16 values][16 queries]
    float scores[2][KEYS * LANES];                         // [32 keys][16 queries]
    bf16 weights[2][KEYS * LANES];                         // [32 keys / 2][16 queries][2]
    float offsets[CHUNK], totals[CHUNK];
} Room;

// Two vectors as bfloat16 side by side, lane by lane.
INLINE __m512i pairs_of(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(0xFFFF0000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_ternarylogic_epi32(high, sum, low, 0xEA);  // (high & sum) | low
}

static void lay_out_queries(Chunk c, int steps, bf16 *to) {
    for (int query = 0; query < c.num_queries; query += LANES)
        for (int step = 0; step < steps; step++) {
            __m512i word[LANES];
            load_pairs(c.q + query * c.q_stride, c.q_stride, c.num_queries - query, c.head_size, step * TILE_PAIRS, word);
            for (int i = 0; i < TILE_PAIRS; i++, to += 2 * LANES) _mm512_store_si512(to, word[i]);
        }
}

static void lay_out_keys(Chunk c, int first_key, int steps, bf16 *to) {
    const int count = least(KEPT_KEYS, c.num_keys - first_key);
    for (int key = 0; key < in_whole(count, KEYS); key++)
        for (int step = 0; step < steps; step++) {
            const int left = key < count ? c.head_size - step * STEP : 0;
            const __mmask32 lanes = left >= STEP ? 0xFFFFFFFFu : left <= 0 ? 0 : (1u << left) - 1;
            _mm512_store_si512(to + (key / TILE_ROWS * steps + step) * TILE_VALUES + key % TILE_ROWS * STEP,
                               _mm512_maskz_loadu_epi16(lanes, c.k + (first_key + key) * c.k_stride + step * STEP));
        }
}

static void lay_out_values(Chunk c, int first_key, bf16 *to) {
    const int count = least(KEPT_KEYS, c.num_keys - first_key);
    for (int key = 0; key < count; key += KEYS)
        for (int d = 0; d < c.head_size; d += TILE_ROWS) {
            const bf16 *at = c.v + (first_key + key) * c.v_stride + d;
            __m512i word[LANES];
            for (int i = 0; i < LANES; i++)
                word[i] = two_rows(at + 2 * i * c.v_stride, c.v_stride, count - key - 2 * i, first_lanes(c.head_size - d));
            transpose(word);
            for (int i = 0; i < TILE_ROWS; i++, to += STEP) _mm512_store_si512(to, word[i]);
        }
}

// 16 queries' weighted sums, divided by the total of their weights.
static void store_queries(Chunk c, int query, const float *sums, const float *total) {
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(total));
    for (int d = 0; d < c.head_size; d += STEP) {
        __m512i word[LANES];
        for (int pair = 0; pair < TILE_PAIRS; pair++) {
            const float *at = sums + (d + 2 * pair) * LANES;
            word[pair] = d + 2 * pair < c.head_size ? pairs_of(_mm512_mul_ps(scale, _mm512_load_ps(at)),
                                                               _mm512_mul_ps(scale, _mm512_load_ps(at + LANES)))
                                                    : _mm512_setzero_si512();
        }
        transpose(word);
        const __mmask16 lanes = first_lanes((c.head_size - d) / 2);
        for (int i = 0; i < least(LANES, c.num_queries - query); i++)
            _mm512_mask_storeu_epi32(c.out + (query + i) * c.out_stride + d, lanes, word[i]);
    }
}
