// Attention for CPUs with AMX: products in tiles, the softmax between them in AVX-512.

#include "cpu_attention.h"
#include "cpu_tiles.h"

enum {
    STEP = 2 * TILE_PAIRS,               // values of a query that one product of tiles takes
    QUERIES = 2 * TILE_ROWS,             // two tiles by two are multiplied together
    KEYS = 256,                          // keys between two updates of the running softmax
    CHUNK = 512,                         // queries for which keys are laid out once; their sums lie in the second cache
};

// sums[32][32] (+)= left[32][steps · 32] · right, whose tiles of 16 columns are `next` values apart and whose steps
// `step`; only the first 16 columns where it is not wide.
INLINE void multiply(int wide, int add, int steps, const bf16 *left, int left_stride, const bf16 *right,
                     int step, int next, int right_stride, float *sums, int sums_stride) {
    const int left_bytes = 2 * left_stride, right_bytes = 2 * right_stride, sums_bytes = 4 * sums_stride;
    float *lower = sums + TILE_ROWS * sums_stride;
    if (add) {
        LOAD_TILE(0, sums, sums_bytes);
        LOAD_TILE(1, lower, sums_bytes);
        if (wide) LOAD_TILE(2, sums + LANES, sums_bytes);
        if (wide) LOAD_TILE(3, lower + LANES, sums_bytes);
    } else {
        ZERO_TILE(0);
        ZERO_TILE(1);
        if (wide) ZERO_TILE(2);
        if (wide) ZERO_TILE(3);
    }
    for (int s = 0; s < steps; s++) {
        LOAD_TILE(6, right + s * step, right_bytes);
        LOAD_TILE(4, left + s * STEP, left_bytes);
        MULTIPLY_TILES(0, 4, 6);
        LOAD_TILE(5, left + TILE_ROWS * left_stride + s * STEP, left_bytes);
        MULTIPLY_TILES(1, 5, 6);
        if (!wide) continue;
        LOAD_TILE(7, right + s * step + next, right_bytes);
        MULTIPLY_TILES(2, 4, 7);
        MULTIPLY_TILES(3, 5, 7);
    }
    STORE_TILE(0, sums, sums_bytes);
    STORE_TILE(1, lower, sums_bytes);
    if (wide) STORE_TILE(2, sums + LANES, sums_bytes);
    if (wide) STORE_TILE(3, lower + LANES, sums_bytes);
}

// Keys as tiles [keys / 16][steps][16 pairs][16 keys][2], zeros after the last key and after a head's last value.
static void lay_out_keys(const bf16 *keys, int64_t stride, int count, int padded, int head_size, bf16 *tiles_of_keys) {
    for (int key = 0; key < padded; key += LANES)
        for (int pair = 0; pair < in_whole(head_size, STEP) / 2; pair += TILE_PAIRS) {
            __m512i word[LANES];
            load_keys(keys + key * stride, stride, count - key, head_size, pair, word);
            for (int i = 0; i < TILE_PAIRS; i++, tiles_of_keys += 2 * LANES) _mm512_storeu_si512(tiles_of_keys, word[i]);
        }
}

// Queries in whole steps and whole blocks, zeros after a head's last value and after the last query.
static void lay_out_queries(Chunk c, int depth, bf16 *queries) {
    for (int row = 0; row < in_whole(c.num_queries, QUERIES); row++)
        for (int d = 0; d < depth; d += STEP) {
            const int left = row < c.num_queries ? c.head_size - d : 0;
            const __mmask32 lanes = left >= STEP ? 0xFFFFFFFFu : left <= 0 ? 0 : (1u << left) - 1;
            _mm512_storeu_si512(queries + row * depth + d, _mm512_maskz_loadu_epi16(lanes, c.q + row * c.q_stride + d));
        }
}

static void attend_chunk(Chunk c) {
    _Alignas(64) bf16 keys[KEYS * MAX_HEAD_SIZE], values[KEYS * MAX_HEAD_SIZE], queries[CHUNK * MAX_HEAD_SIZE];
    _Alignas(64) bf16 weights[QUERIES * KEYS];
    _Alignas(64) float scores[QUERIES * KEYS], sums[CHUNK * MAX_HEAD_SIZE];
    float greatest[CHUNK], total[CHUNK];
    const int width = in_whole(c.head_size, LANES), depth = in_whole(c.head_size, STEP);
    lay_out_queries(c, depth, queries);
    for (int row = 0; row < c.num_queries; row++) {
        greatest[row] = LOWEST;
        total[row] = 0;
    }
    if (c.num_queries % QUERIES) memset(weights, 0, sizeof weights);  // rows after the last query are multiplied too
    for (int first_key = 0; first_key < c.num_keys; first_key += KEYS) {
        const int count = least(KEYS, c.num_keys - first_key), padded = in_whole(count, STEP);
        lay_out_keys(c.k + first_key * c.k_stride, c.k_stride, count, padded, c.head_size, keys);
        lay_out_values(c.v + first_key * c.v_stride, c.v_stride, count, padded, c.head_size, values, 2 * width);
        for (int first = 0; first < c.num_queries; first += QUERIES) {
            for (int key = 0; key < padded; key += 2 * LANES)
                multiply(1, 0, depth / STEP, queries + first * depth, depth, keys + key * depth, TILE_VALUES,
                         LANES * depth, 2 * TILE_PAIRS, scores + key, KEYS);
            for (int row = 0; row < least(QUERIES, c.num_queries - first); row++)
                weigh(scores + row * KEYS, count, c.factor, weights + row * KEYS, greatest + first + row,
                      total + first + row, sums + (first + row) * width, first_key ? width : 0);
            for (int d = 0; d < width; d += 2 * LANES)
                multiply(d + LANES < width, first_key > 0, padded / STEP, weights, KEYS, values + 2 * d,
                         2 * width * TILE_PAIRS, 2 * LANES, 2 * width, sums + first * width + d, width);
        }
    }
    store_chunk(c, sums, width, total);
}

// Bidirectional attention within each sequence; see over_chunks.
void attend_amx(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t q_stride, int64_t k_stride,
                int64_t v_stride, int64_t out_stride, const int32_t *bounds, int sequences, int heads, int head_size,
                float scale, int threads) {
    const Chunk all = {.q = q, .k = k, .v = v, .out = out, .q_stride = q_stride, .k_stride = k_stride,
                       .v_stride = v_stride, .out_stride = out_stride, .head_size = head_size,
                       .factor = scale * LOG2_E};
    over_chunks(all, bounds, sequences, heads, CHUNK, threads, begin_tiles, attend_chunk, end_tiles);
}
