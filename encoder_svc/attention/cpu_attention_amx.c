// Attention for CPUs with AMX: products in tiles, the softmax beside them in AVX-512.
//
// All is transposed, scores [keys, queries] and sums [D, queries]: a vector holds 16 queries, nothing is added up across
// its lanes, and the sums of 16 queries stay in tiles 0 to 4 while all kept keys (cpu_attention_room.h) pass by. While 32
// keys' scores become weights, the next 32 keys' scores are made, and the weights of the last 32 taken to their values.
//
// A query's weights are powers of two of what its scores are above the highest of the first 32 keys, not of all, so that
// nothing is weighed anew: later ones may be as large as floats are. Where they grew too large, the chunk is done once
// more, with the highest score of all for such a query and the 15 that share its vectors.

#include "cpu_attention_room.h"

#define MOST 1e30f  // of a total of weights: times a value it is still a float

_Static_assert(MAX_SUMS == 5 && MAX_STEPS == 3, "as many are written out below");

// 16 queries and 32 of the kept keys.
typedef struct { int query, key; } Item;

// What scores of 16 queries become weights by. The total is of the rounded ones.
typedef struct {
    __m512 factor, offset, total;
} Softmax;

INLINE void weigh(int pair, const float *scores, bf16 *weights, Softmax *s) {
    const float *at = scores + 2 * pair * LANES;
    const __m512 even = exp2_of(_mm512_fmsub_ps(s->factor, _mm512_load_ps(at), s->offset));
    const __m512 odd = exp2_of(_mm512_fmsub_ps(s->factor, _mm512_load_ps(at + LANES), s->offset));
    const __m512i both = pairs_of(even, odd);
    s->total = _mm512_dpbf16_ps(s->total, (__m512bh)both, (__m512bh)_mm512_set1_epi32(0x3F803F80));
    _mm512_store_si512(weights + 2 * pair * LANES, both);
}

#define MULTIPLY_KEYS(STEP_OF_THEM)                           \
    LOAD_TILE(6, keys + (STEP_OF_THEM) * TILE_VALUES, 64);    \
    LOAD_TILE(7, queries + (STEP_OF_THEM) * TILE_VALUES, 64); \
    MULTIPLY_TILES(5, 6, 7)

#define MULTIPLY_VALUES(T)                          \
    if (T < sums) {                                 \
        LOAD_TILE(6, values + T * TILE_VALUES, 64); \
        MULTIPLY_TILES(T, 6, 7);                    \
    }

INLINE void multiply_keys(int steps, const bf16 *keys, const bf16 *queries, float *scores) {
    for (int half = 0; half < 2; half++, keys += steps * TILE_VALUES, scores += TILE_FLOATS) {
        ZERO_TILE(5);
        for (int step = 0; step < steps; step++) { MULTIPLY_KEYS(step); }
        STORE_TILE(5, scores, 64);
    }
}

INLINE void multiply_values(int sums, const bf16 *values, const bf16 *weights) {
    LOAD_TILE(7, weights, 64);
    MULTIPLY_VALUES(0) MULTIPLY_VALUES(1) MULTIPLY_VALUES(2) MULTIPLY_VALUES(3) MULTIPLY_VALUES(4)
}

// All three, in small portions: a core looks a few hundred instructions ahead for something to do beside a product.
INLINE void do_beside(int steps, const bf16 *keys, const bf16 *queries, float *next_scores,
                      const float *scores, bf16 *weights, Softmax *s,
                      int sums, const bf16 *values, const bf16 *last_weights) {
#define WEIGH(PAIR) weigh(PAIR, scores, weights, s);
    ZERO_TILE(5);
    MULTIPLY_KEYS(0);
    WEIGH(0) WEIGH(1)
    if (steps > 1) { MULTIPLY_KEYS(1); }
    WEIGH(2)
    if (steps > 2) { MULTIPLY_KEYS(2); }
    WEIGH(3) WEIGH(4)
    STORE_TILE(5, next_scores, 64);
    keys += steps * TILE_VALUES;
    ZERO_TILE(5);
    MULTIPLY_KEYS(0);
    WEIGH(5)
    if (steps > 1) { MULTIPLY_KEYS(1); }
    WEIGH(6) WEIGH(7)
    if (steps > 2) { MULTIPLY_KEYS(2); }
    WEIGH(8)
    STORE_TILE(5, next_scores + TILE_FLOATS, 64);
    LOAD_TILE(7, last_weights, 64);
    MULTIPLY_VALUES(0)
    WEIGH(9) WEIGH(10)
    MULTIPLY_VALUES(1)
    WEIGH(11)
    MULTIPLY_VALUES(2)
    WEIGH(12) WEIGH(13)
    MULTIPLY_VALUES(3)
    WEIGH(14)
    MULTIPLY_VALUES(4)
    WEIGH(15)
#undef WEIGH
}

#define FOR_ALL_SUMS(DO) DO(0) DO(1) DO(2) DO(3) DO(4)

INLINE void begin_sums(int sums, const float *from) {
#define BEGIN(T) if (T < sums && from) LOAD_TILE(T, from + T * TILE_FLOATS, 64); else ZERO_TILE(T);
    FOR_ALL_SUMS(BEGIN)
#undef BEGIN
}

INLINE void end_sums(int sums, float *to) {
#define END(T) if (T < sums) STORE_TILE(T, to + T * TILE_FLOATS, 64);
    FOR_ALL_SUMS(END)
#undef END
}

INLINE void raise_offsets(const float *scores, int count, __m512 factor, float *offsets) {
    __m512 highest = _mm512_set1_ps(LOWEST);
    for (int key = 0; key < count; key++) highest = _mm512_max_ps(highest, _mm512_load_ps(scores + key * LANES));
    _mm512_store_ps(offsets, _mm512_max_ps(_mm512_load_ps(offsets), _mm512_mul_ps(highest, factor)));
}

static int are_within(const float *totals, int count) {
    int within = 1;
    for (int i = 0; i < count; i++) within &= totals[i] < MOST;
    return within;
}

// Raises offsets to the highest scores of the kept keys where totals are too large.
static void find_offsets(Chunk c, Room *r, int steps, int count) {
    for (int query = 0; query < c.num_queries; query += LANES) {
        if (are_within(r->totals + query, least(LANES, c.num_queries - query))) continue;
        for (int key = 0; key < count; key += KEYS) {
            multiply_keys(steps, r->keys + key * steps * STEP, r->queries + query * steps * STEP, r->scores[0]);
            raise_offsets(r->scores[0], least(KEYS, count - key), _mm512_set1_ps(c.factor), r->offsets + query);
        }
    }
}

INLINE Item after(Item item, int count) {
    return item.key + KEYS < count ? (Item){item.query, item.key + KEYS} : (Item){item.query + LANES, 0};
}

// The kept keys, and what is known of them.
typedef struct {
    int first_key, count, steps, sums, is_last, offsets_known;
} Stretch;

// What weights are made by, once an item's scores are there.
INLINE void prepare(Softmax *s, Room *r, const Stretch *of, Item item, float *scores) {
    for (int key = of->count - item.key; key < KEYS; key++) _mm512_store_ps(scores + key * LANES, _mm512_set1_ps(LOWEST));
    if (item.key) return;
    if (!of->first_key && !of->offsets_known) raise_offsets(scores, KEYS, s->factor, r->offsets + item.query);
    s->offset = _mm512_load_ps(r->offsets + item.query);
    s->total = _mm512_load_ps(r->totals + item.query);
}

// Takes all queries to the kept keys.
static void attend_to_kept(Chunk c, Room *r, Stretch of) {
    const int steps = of.steps, sums = of.sums, width = sums * TILE_ROWS;
    Softmax s = {.factor = _mm512_set1_ps(c.factor)};
    Item next = {0, 0}, item = {-1, 0}, last = {-1, 0};  // whose scores are made, become weights, are taken to values
    for (int i = 0; next.query < c.num_queries || item.query < c.num_queries || last.query < c.num_queries; i++) {
        const int has_next = next.query < c.num_queries, has_last = last.query >= 0;
        const int has_item = item.query >= 0 && item.query < c.num_queries;
        float *next_scores = r->scores[i & 1], *scores = r->scores[~i & 1], *last_sums = r->sums + last.query * width;
        bf16 *weights = r->weights[i & 1], *last_weights = r->weights[~i & 1];
        const bf16 *keys = r->keys + next.key * steps * STEP, *queries = r->queries + next.query * steps * STEP;
        const bf16 *values = r->values + last.key * width;
        if (has_item) prepare(&s, r, &of, item, scores);
        if (has_last && !last.key) begin_sums(sums, of.first_key ? last_sums : 0);
        if (has_next && has_item && has_last)
            do_beside(steps, keys, queries, next_scores, scores, weights, &s, sums, values, last_weights);
        else {
            if (has_next) multiply_keys(steps, keys, queries, next_scores);
            if (has_last) multiply_values(sums, values, last_weights);
            for (int pair = 0; has_item && pair < KEYS / 2; pair++) weigh(pair, scores, weights, &s);
        }
        if (has_item && item.key + KEYS >= of.count) _mm512_store_ps(r->totals + item.query, s.total);
        if (has_last && last.key + KEYS >= of.count) {
            float *ended = of.is_last ? r->sums : last_sums;  // in one place, which stays in the nearest cache
            end_sums(sums, ended);
            if (of.is_last) store_queries(c, last.query, ended, r->totals + last.query);
        }
        last = item;
        item = next;
        if (has_next) next = after(next, of.count);
    }
}

static void attend_chunk(Chunk c) {
    static _Thread_local Room r;  // not on the stack, which may be small (OMP_STACKSIZE)
    const int steps = (c.head_size + STEP - 1) / STEP, sums = (c.head_size + TILE_ROWS - 1) / TILE_ROWS;
    lay_out_queries(c, steps, r.queries);
    for (int i = 0; i < CHUNK; i++) r.offsets[i] = LOWEST;
    for (int once_more = 0; once_more < 2; once_more++) {
        for (int key = 0; once_more && key < c.num_keys; key += KEPT_KEYS) {
            lay_out_keys(c, key, steps, r.keys);
            find_offsets(c, &r, steps, least(KEPT_KEYS, c.num_keys - key));
        }
        memset(r.totals, 0, sizeof r.totals);
        for (int key = 0; key < c.num_keys; key += KEPT_KEYS) {
            const int count = least(KEPT_KEYS, c.num_keys - key);
            lay_out_keys(c, key, steps, r.keys);
            lay_out_values(c, key, r.values);
            attend_to_kept(c, &r, (Stretch){key, count, steps, sums, key + count == c.num_keys, once_more});
        }
        if (are_within(r.totals, c.num_queries)) return;
    }
}

// Queries of a chunk, so that threads have equally much to do: parts of the longest sequence.
static int chunk_size(const int32_t *bounds, int sequences, int heads, int threads) {
    int longest = 1, best = CHUNK;
    for (int i = 0; i < sequences; i++) longest = longest > bounds[i + 1] - bounds[i] ? longest : bounds[i + 1] - bounds[i];
    int64_t lowest = INT64_MAX;
    for (int parts = (longest + CHUNK - 1) / CHUNK; parts <= (longest + LEAST_CHUNK - 1) / LEAST_CHUNK; parts++) {
        const int size = in_whole((longest + parts - 1) / parts, LANES);
        const int64_t rounds = ((int64_t)all_chunks(bounds, sequences, size) * heads + threads - 1) / threads;
        if (rounds * (size + LAYING_OUT) >= lowest) continue;
        lowest = rounds * (size + LAYING_OUT);
        best = size;
    }
    return best;
}

// Bidirectional attention within each sequence; see over_chunks. D is at most MAX_WIDTH.
void attend_amx(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t q_stride, int64_t k_stride,
                int64_t v_stride, int64_t out_stride, const int32_t *bounds, int sequences, int heads, int head_size,
                float scale, int threads) {
    const Chunk all = {.q = q, .k = k, .v = v, .out = out, .q_stride = q_stride, .k_stride = k_stride,
                       .v_stride = v_stride, .out_stride = out_stride, .head_size = head_size,
                       .factor = scale * LOG2_E};
    over_chunks(all, bounds, sequences, heads, chunk_size(bounds, sequences, heads, threads), threads, begin_tiles,
                attend_chunk, end_tiles);
}
