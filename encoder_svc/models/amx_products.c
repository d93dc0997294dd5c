// Matrix products with AMX's tiles, and what follows them before anything is rounded.
//
// Rows that are multiplied lie in blocks (cpu_vectors.h), weights in panels [outputs / 32][depth / 32][2][16 pairs]
// [16 outputs][2], so that tiles are read in the order in which they lie: two by two are multiplied together. Rows of a
// block after the last hold anything: they shape no other row.

#include "cpu_tiles.h"

enum {
    GROUP = 4,                           // panels that are multiplied by rows that lie in the second cache
    MAX_GROUP = 9,                       // where heads are rotated: those of whole heads, for head sizes 72 and 80 9 and 5
    STEPS = 40,                          // for which sums stay in their tiles
    ROWS = 256,                          // at most: they and their sums for a group lie in the second cache
};

enum { ACTIVATED = 1, ADDED = 2, IN_BLOCKS = 4 };  // what becomes of a product

typedef struct {
    const bf16 *rows, *panels, *bias, *gate_bias;  // with gate_bias, panels of gate and of up values take turns
    bf16 *out;                                     // [N, outputs], or blocks
    int num_rows, num_steps, outputs, how;
    float slope, cubic;                            // of the activation x · sigmoid(slope · (x + cubic · x³))
    const float *cos, *sin;                        // [N, head_size / 2], where outputs are q, k and v, for q and k
    int head_size;
} Product;

typedef float Sums[ROWS / BLOCK][BLOCK][BLOCK];  // of one panel, by block of rows

INLINE void multiply(int add, int steps, const bf16 *left, const bf16 *right, float sums[BLOCK][BLOCK]) {
    const int bytes = BLOCK * sizeof(float);
    if (add) {
        LOAD_TILE(0, sums[0], bytes);
        LOAD_TILE(1, sums[TILE_ROWS], bytes);
        LOAD_TILE(2, sums[0] + LANES, bytes);
        LOAD_TILE(3, sums[TILE_ROWS] + LANES, bytes);
    } else {
        ZERO_TILE(0);
        ZERO_TILE(1);
        ZERO_TILE(2);
        ZERO_TILE(3);
    }
    for (int s = 0; s < steps; s++, left += BLOCK_VALUES, right += BLOCK_VALUES) {
        LOAD_TILE(6, right, 64);
        LOAD_TILE(4, left, 64);
        MULTIPLY_TILES(0, 4, 6);
        LOAD_TILE(5, left + TILE_VALUES, 64);
        MULTIPLY_TILES(1, 5, 6);
        LOAD_TILE(7, right + TILE_VALUES, 64);
        MULTIPLY_TILES(2, 4, 7);
        MULTIPLY_TILES(3, 5, 7);
    }
    STORE_TILE(0, sums[0], bytes);
    STORE_TILE(1, sums[TILE_ROWS], bytes);
    STORE_TILE(2, sums[0] + LANES, bytes);
    STORE_TILE(3, sums[TILE_ROWS] + LANES, bytes);
}

static void multiply_group(const Product *p, int first_panel, int panels, int first_row, int stop_row, Sums *sums) {
    for (int first = 0; first < p->num_steps; first += STEPS) {
        const int steps = least(STEPS, p->num_steps - first);
        for (int panel = 0; panel < panels; panel++) {
            const bf16 *right = p->panels + ((int64_t)(first_panel + panel) * p->num_steps + first) * BLOCK_VALUES;
            for (int row = first_row, block = 0; row < stop_row; row += BLOCK, block++)
                multiply(first > 0, steps, p->rows + in_blocks(row, first, p->num_steps), right, sums[panel][block]);
        }
    }
}

INLINE __m512 activated(__m512 x, float slope, float cubic) {
    const __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(cubic)));
    const __m512 power = _mm512_mul_ps(_mm512_add_ps(x, cubed), _mm512_set1_ps(-slope * LOG2_E));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), exp2_of(power))));
}

// One row's 32 outputs of a panel.
INLINE void finish(const Product *p, int64_t row, int panel, const float *sums, const float *gate) {
    for (int c = 0; c < BLOCK; c += LANES) {
        const int column = panel * BLOCK + c;
        const __mmask16 lanes = first_lanes(p->outputs - column);
        __m512 value = _mm512_add_ps(_mm512_loadu_ps(sums + c), load(p->bias + column, lanes));
        if (gate) {
            const __m512 gates = _mm512_add_ps(_mm512_loadu_ps(gate + c), load(p->gate_bias + column, lanes));
            value = _mm512_mul_ps(value, activated(gates, p->slope, p->cubic));
        } else if (p->how & ACTIVATED) {
            value = activated(value, p->slope, p->cubic);
        }
        if (p->how & IN_BLOCKS) {
            store(p->out + in_blocks(row, panel, in_whole(p->outputs, BLOCK) / BLOCK) + c, 0xFFFF, value);
            continue;
        }
        bf16 *to = p->out + row * p->outputs + column;
        if (p->how & ADDED) value = _mm512_add_ps(value, load(to, lanes));
        store(to, lanes, value);
    }
}

// One row's heads of a group, as they begin in line: q and k rotated, a head's halves the pairs.
INLINE void finish_heads(const Product *p, int64_t row, int first_column, int columns, const float *line) {
    const int half = p->head_size / 2;
    for (int head = 0; head < columns; head += p->head_size) {
        const float *from = line + head;
        bf16 *to = p->out + row * p->outputs + first_column + head;
        for (int d = 0; d < half; d += LANES) {
            const __mmask16 lanes = first_lanes(half - d);
            const __m512 first = _mm512_loadu_ps(from + d), second = _mm512_loadu_ps(from + half + d);
            if (first_column + head >= p->outputs / 3 * 2) {
                store(to + d, lanes, first);
                store(to + half + d, lanes, second);
                continue;
            }
            const __m512 c = _mm512_maskz_loadu_ps(lanes, p->cos + row * half + d);
            const __m512 s = _mm512_maskz_loadu_ps(lanes, p->sin + row * half + d);
            store(to + d, lanes, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
            store(to + half + d, lanes, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
        }
    }
}

static void finish_rotated(const Product *p, int first_panel, int panels, int first_row, int stop_row, Sums *sums) {
    _Alignas(64) float line[MAX_GROUP * BLOCK + LANES];
    const int first_column = first_panel * BLOCK, columns = least(panels * BLOCK, p->outputs - first_column);
    for (int row = first_row; row < stop_row; row++) {
        const int block = (row - first_row) / BLOCK, within = (row - first_row) % BLOCK;
        for (int c = 0; c < columns; c += LANES) {
            const __m512 bias = load(p->bias + first_column + c, first_lanes(columns - c));
            const float *from = sums[c / BLOCK][block][within] + c % BLOCK;
            _mm512_store_ps(line + c, _mm512_add_ps(_mm512_loadu_ps(from), bias));
        }
        finish_heads(p, row, first_column, columns, line);
    }
}

static void finish_group(const Product *p, int first_panel, int panels, int first_row, int stop_row, Sums *sums) {
    const int gated = p->gate_bias != 0, each = 1 + gated;
    for (int row = first_row; row < stop_row; row++)
        for (int panel = 0; panel < panels; panel += each) {
            const int block = (row - first_row) / BLOCK, line = (row - first_row) % BLOCK;
            finish(p, row, (first_panel + panel) / each, sums[panel + gated][block][line],
                   gated ? sums[panel][block][line] : 0);
        }
}

// Panels that are taken together: whole heads, where heads are rotated.
static int group_of(int head_size) {
    int panels = 1;
    while (head_size && panels * BLOCK % head_size) panels++;
    return panels >= GROUP ? panels : GROUP / panels * panels;
}

static void multiply_all(const Product *p, int threads) {
    const int num_panels = in_whole(p->outputs, BLOCK) / BLOCK * (p->gate_bias ? 2 : 1);
    const int group = group_of(p->head_size), groups = (num_panels + group - 1) / group;
    // At least two items a thread, where there are enough rows.
    const int wanted = (2 * threads + groups - 1) / groups, needed = (p->num_rows + ROWS - 1) / ROWS;
    const int parts = wanted > needed ? wanted : needed;
    const int part = in_whole((p->num_rows + parts - 1) / parts, BLOCK);
    const int used = (p->num_rows + part - 1) / part;
#pragma omp parallel num_threads(threads)
    {
        _Alignas(64) Sums sums[MAX_GROUP];
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int item = 0; item < groups * used; item++) {
            const int first_panel = item / used * group, first_row = item % used * part;
            const int here = least(group, num_panels - first_panel), stop = least(first_row + part, p->num_rows);
            multiply_group(p, first_panel, here, first_row, stop, sums);
            if (p->head_size)
                finish_rotated(p, first_panel, here, first_row, stop, sums);
            else
                finish_group(p, first_panel, here, first_row, stop, sums);
        }
        end_tiles();
    }
}

void multiply_amx(const bf16 *rows, const bf16 *panels, const bf16 *bias, const bf16 *gate_bias, bf16 *out,
                  int num_rows, int num_steps, int outputs, int how, float slope, float cubic, int threads) {
    const Product p = {.rows = rows, .panels = panels, .bias = bias, .gate_bias = gate_bias, .out = out,
                       .num_rows = num_rows, .num_steps = num_steps, .outputs = outputs, .how = how,
                       .slope = slope, .cubic = cubic};
    multiply_all(&p, threads);
}

// q, k and v [N, 3, H, D], q and k rotated; D's whole heads end with a panel within MAX_GROUP.
void multiply_rotated_amx(const bf16 *rows, const bf16 *panels, const bf16 *bias, bf16 *out, const float *cos,
                          const float *sin, int num_rows, int num_steps, int outputs, int head_size, int threads) {
    const Product p = {.rows = rows, .panels = panels, .bias = bias, .out = out, .num_rows = num_rows,
                       .num_steps = num_steps, .outputs = outputs, .cos = cos, .sin = sin, .head_size = head_size};
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
