// Matrix products with AMX's tiles, and what follows them before anything is rounded.
//
// Rows that are multiplied lie in blocks (cpu_vectors.h), weights in panels [outputs / 32][depth / 32][2][16 pairs]
// [16 outputs][2], so that tiles are read in the order in which they lie: two by two are multiplied together. Rows of a
// block after the last hold anything: they shape no other row.

#include "amx_outputs.h"
#include "cpu_tiles.h"

enum {
    LINES = BLOCK_VALUES / BLOCK,        // of 64 bytes, of a panel's step
    CHUNK = 3,                           // steps after which sums are left for those of the next block
    STEPS = 54,                          // for which rows, PART_BYTES of them, lie in the second cache
    PART_BYTES = 1000000,
    LEAST_ROWS = 128,                    // of a thread: with less, threads take panels of their own for the same rows
};

// Lines of memory that will be needed soon, `step` values apart. A share is brought into the second cache at a time.
typedef struct { const bf16 *at; int64_t step; int lines, share; } Ahead;

// Two blocks of rows by two panels, or less of either: their sums lie in the nearest cache.
typedef struct {
    const bf16 *blocks[2], *panels[2];
    Sums *sums[2];                                 // by panel, those of blocks side by side
    const Sums *begin[2];                          // what they begin with, or 0
    Ahead ahead[8];
    int num_blocks, num_panels, num_steps, chunk, num_ahead, takes;  // how often a block and a panel are taken
} Square;

INLINE void bring(Ahead *a) {
    const int share = least(a->share, a->lines);
    for (int line = 0; line < share; line++, a->at += a->step) _mm_prefetch(a->at, _MM_HINT_T1);
    a->lines -= share;
}

static void look_ahead(Square *q, const bf16 *at, int64_t step, int lines) {
    q->ahead[q->num_ahead++] = (Ahead){at, step, lines, (lines + q->takes - 1) / q->takes};
}

// A tile is stored just before it takes up other sums, while those of other tiles are multiplied.
#define TAKE_UP(T, OFFSET)                                                \
    if (left_behind) STORE_TILE(T, left_behind + (OFFSET), bytes);        \
    if (sums) LOAD_TILE(T, sums + (OFFSET), bytes);                       \
    else ZERO_TILE(T)

INLINE void multiply(int steps, const bf16 *left, const bf16 *right, const float *sums, float *left_behind) {
    const int bytes = BLOCK * sizeof(float), lower = TILE_ROWS * BLOCK;
    LOAD_TILE(6, right, 64);
    LOAD_TILE(4, left, 64);
    TAKE_UP(0, 0);
    MULTIPLY_TILES(0, 4, 6);
    LOAD_TILE(5, left + TILE_VALUES, 64);
    TAKE_UP(1, lower);
    MULTIPLY_TILES(1, 5, 6);
    LOAD_TILE(7, right + TILE_VALUES, 64);
    TAKE_UP(2, LANES);
    MULTIPLY_TILES(2, 4, 7);
    TAKE_UP(3, lower + LANES);
    MULTIPLY_TILES(3, 5, 7);
    for (int s = 1; s < steps; s++) {
        left += BLOCK_VALUES;
        right += BLOCK_VALUES;
        LOAD_TILE(6, right, 64);
        LOAD_TILE(4, left, 64);
        MULTIPLY_TILES(0, 4, 6);
        LOAD_TILE(5, left + TILE_VALUES, 64);
        MULTIPLY_TILES(1, 5, 6);
        LOAD_TILE(7, right + TILE_VALUES, 64);
        MULTIPLY_TILES(2, 4, 7);
        MULTIPLY_TILES(3, 5, 7);
    }
}

static void multiply_square(Square *q) {
    float *left_behind = 0;
    for (int first = 0; first < q->num_steps; first += q->chunk)
        for (int panel = 0; panel < q->num_panels; panel++)
            for (int i = 0; i < q->num_blocks; i++) {
                const int block = panel ? q->num_blocks - 1 - i : i;  // the one that was taken last
                float *sums = q->sums[panel][block][0];
                const float *begin = first ? sums : q->begin[panel] ? q->begin[panel][block][0] : 0;
                for (int run = 0; run < q->num_ahead; run++) bring(&q->ahead[run]);
                multiply(least(q->chunk, q->num_steps - first), q->blocks[block] + first * BLOCK_VALUES,
                         q->panels[panel] + first * BLOCK_VALUES, begin, left_behind);
                left_behind = sums;
            }
    STORE_TILE(0, left_behind, BLOCK * sizeof(float));
    STORE_TILE(1, left_behind + TILE_ROWS * BLOCK, BLOCK * sizeof(float));
    STORE_TILE(2, left_behind + LANES, BLOCK * sizeof(float));
    STORE_TILE(3, left_behind + TILE_ROWS * BLOCK + LANES, BLOCK * sizeof(float));
}

// Panels that are finished together: two, or whole heads, where heads are rotated.
static int group_of(int head_size) {
    int panels = 1;
    while (head_size && panels * BLOCK % head_size) panels++;
    return in_whole(2, panels);
}

static int panels_of(const Product *p) { return in_blocks_of(p->outputs) * (p->gate_bias ? 2 : 1); }

// Where a panel's outputs of a row go.
static const bf16 *out_of(const Product *p, int row, int panel) {
    if (p->gate_bias) panel /= 2;
    if (p->how & IN_BLOCKS) return p->out + in_blocks(row, panel, in_blocks_of(p->outputs));
    return p->out + (int64_t)row * p->outputs + panel * BLOCK;
}

typedef struct {
    Range rows, panels;          // of a part
    Range group, steps;          // those of its panels and of its rows' steps that are multiplied
} Work;

// What will be needed: a share of the panels and the sums that follow, and where outputs of this square go.
static void look_ahead_of(Square *q, const Product *p, const Work *w, int row, int panel) {
    const int squares = blocks_by_two(w->rows.stop - w->rows.first), square = (row - w->rows.first) / (2 * BLOCK);
    const int num_blocks = in_blocks_of(p->num_rows);
    // The same panel of the next group, or after the last group of the first one's next steps.
    int next = panel + w->group.stop - w->group.first, step = w->steps.first;
    if (next >= w->panels.stop) {
        next -= w->group.stop - w->panels.first;
        step = w->steps.stop;
    }
    const int steps = least(w->steps.stop - w->steps.first, p->num_steps - step);
    const int share = (steps * LINES + squares - 1) / squares;
    if (steps > 0) look_ahead(q, panel_of(p, next, step) + (int64_t)square * share * BLOCK, BLOCK, share);
    if (p->sums && steps > 0) {
        const int is_last = square + 1 == squares;
        const Sums *sums = p->sums + (int64_t)(is_last ? next : panel) * num_blocks;
        look_ahead(q, (const bf16 *)(sums + (is_last ? w->rows.first : row + 2 * BLOCK) / BLOCK), BLOCK, 4 * LINES);
    }
    if (w->steps.stop < p->num_steps) return;
    for (int first = row; first < least(row + 2 * BLOCK, w->rows.stop); first += BLOCK)
        look_ahead(q, out_of(p, first, panel), p->how & IN_BLOCKS ? BLOCK : p->outputs,
                   least(BLOCK, w->rows.stop - first));
}

static Square square_of(const Product *p, const Work *w, int row, int panel, Sums *local) {
    const int num_blocks = in_blocks_of(p->num_rows), steps = w->steps.stop - w->steps.first;
    Square q = {.num_blocks = w->rows.stop - row > BLOCK ? 2 : 1, .num_panels = least(2, w->group.stop - panel),
                .num_steps = steps};
    q.chunk = q.num_blocks * q.num_panels > 1 ? CHUNK : steps;
    q.takes = q.num_blocks * q.num_panels * ((steps + q.chunk - 1) / q.chunk);
    for (int i = 0; i < q.num_blocks; i++)
        q.blocks[i] = p->rows + in_blocks(row + i * BLOCK, w->steps.first, p->num_steps);
    for (int i = 0; i < q.num_panels; i++) {
        Sums *kept = p->sums + (int64_t)(panel + i) * num_blocks + row / BLOCK;
        q.panels[i] = panel_of(p, panel + i, w->steps.first);
        q.begin[i] = w->steps.first ? kept : 0;
        q.sums[i] = w->steps.stop < p->num_steps ? kept : local + (panel + i - w->group.first) * 2;
        look_ahead_of(&q, p, w, row, panel + i);
    }
    return q;
}

// A group's sums for all rows of a part, and, with the last steps, its outputs.
static void multiply_group(const Product *p, const Work *w, Sums *local) {
    for (int row = w->rows.first; row < w->rows.stop; row += 2 * BLOCK) {
        for (int panel = w->group.first; panel < w->group.stop; panel += 2) {
            Square q = square_of(p, w, row, panel, local);
            multiply_square(&q);
        }
        if (w->steps.stop < p->num_steps) continue;
        const Range rows = {row, least(row + 2 * BLOCK, w->rows.stop)};
        if (p->head_size)
            finish_rotated(p, rows, w->group, local);
        else
            finish_group(p, rows, w->group, local);
    }
}

// Of rows that are multiplied by all panels before the next ones: they lie in the second cache.
static int steps_at_a_time(int num_steps) {
    const int times = (num_steps + STEPS - 1) / STEPS;
    return (num_steps + times - 1) / times;
}

static void multiply_part(const Product *p, Range rows, Range panels) {
    _Alignas(64) Sums local[2 * MAX_GROUP];
    const int group = group_of(p->head_size), steps = steps_at_a_time(p->num_steps);
    for (int step = 0; step < p->num_steps; step += steps)
        for (int first = panels.first; first < panels.stop; first += group) {
            const Work w = {rows, panels, {first, least(first + group, panels.stop)},
                            {step, least(step + steps, p->num_steps)}};
            multiply_group(p, &w, local);
        }
}

// Each thread has rows of its own, or, where there are few, panels.
static void multiply_all(const Product *p, int threads) {
    const int most = PART_BYTES / (steps_at_a_time(p->num_steps) * BLOCK_VALUES * (int)sizeof(bf16)) * BLOCK;
    const int needed = (p->num_rows + most - 1) / most, even = in_whole(needed, threads);
    const int by_rows = p->num_rows >= even * LEAST_ROWS, wanted = by_rows ? even : needed;
    const int part = in_whole((p->num_rows + wanted - 1) / wanted, BLOCK), parts = (p->num_rows + part - 1) / part;
    const int num_panels = panels_of(p), ranges = by_rows ? 1 : threads;
    const int range = in_whole((num_panels + ranges - 1) / ranges, group_of(p->head_size));
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int item = 0; item < parts * ranges; item++) {
            const int row = item / ranges * part, panel = item % ranges * range;
            multiply_part(p, (Range){row, least(row + part, p->num_rows)},
                          (Range){panel, least(panel + range, num_panels)});
        }
        end_tiles();
    }
}

void multiply_amx(const bf16 *rows, const bf16 *panels, const bf16 *bias, const bf16 *gate_bias, bf16 *out,
                  float *sums, int num_rows, int num_steps, int outputs, int how, float slope, float cubic,
                  int threads) {
    const Product p = {.rows = rows, .panels = panels, .bias = bias, .gate_bias = gate_bias, .out = out,
                       .sums = (Sums *)sums, .num_rows = num_rows, .num_steps = num_steps, .outputs = outputs,
                       .how = how, .slope = slope, .cubic = cubic};
    multiply_all(&p, threads);
}

// q, k and v [N, 3, H, D], q and k rotated; D's whole heads end with a panel within MAX_GROUP.
void multiply_rotated_amx(const bf16 *rows, const bf16 *panels, const bf16 *bias, bf16 *out, float *sums,
                          const float *cos, const float *sin, int num_rows, int num_steps, int outputs, int head_size,
                          int threads) {
    const Product p = {.rows = rows, .panels = panels, .bias = bias, .out = out, .sums = (Sums *)sums,
                       .num_rows = num_rows, .num_steps = num_steps, .outputs = outputs, .cos = cos, .sin = sin,
                       .head_size = head_size};
    multiply_all(&p, threads);
}

// Rows of x [N, size] in blocks.
void lay_out_rows(const bf16 *x, bf16 *blocks, int64_t num_rows, int size, int threads) {
    const int num_steps = in_whole(size, BLOCK) / BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++)
        for (int step = 0; step < num_steps; step++) {
            const int left = size - step * BLOCK;
            const __mmask32 lanes = left >= BLOCK ? 0xFFFFFFFFu : (1u << left) - 1;
            _mm512_storeu_si512(blocks + in_blocks(row, step, num_steps),
                                _mm512_maskz_loadu_epi16(lanes, x + row * size + step * BLOCK));
        }
}
