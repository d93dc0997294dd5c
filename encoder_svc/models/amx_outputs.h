// What becomes of the sums of products with AMX: bias, activation, residual or rotary, rounded to bfloat16.

#pragma once

#include "cpu_vectors.h"

enum { MAX_GROUP = 9 };  // panels of whole heads that are rotated, for head sizes 72 and 80 9 and 5

enum { ACTIVATED = 1, ADDED = 2, IN_BLOCKS = 4 };  // what becomes of a product

typedef float Sums[BLOCK][BLOCK];                  // of a block of rows and a panel

typedef struct {
    const bf16 *rows, *panels, *bias, *gate_bias;  // with gate_bias, panels of gate and of up values take turns
    bf16 *out;                                     // [N, outputs], or blocks
    Sums *sums;                                    // [panels][blocks], where there are more than STEPS
    int num_rows, num_steps, outputs, how;
    float slope, cubic;                            // of the activation x · sigmoid(slope · (x + cubic · x³))
    const float *cos, *sin;                        // [N, head_size / 2], where outputs are q, k and v, for q and k
    int head_size;
} Product;

typedef struct { int first, stop; } Range;

INLINE int in_blocks_of(int count) { return (count + BLOCK - 1) / BLOCK; }

INLINE int blocks_by_two(int num_rows) { return (num_rows + 2 * BLOCK - 1) / (2 * BLOCK); }

INLINE const bf16 *panel_of(const Product *p, int panel, int step) {
    return p->panels + ((int64_t)panel * p->num_steps + step) * BLOCK_VALUES;
}

INLINE __m512 activated(__m512 x, float slope, float cubic) {
    const __m512 factor = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-slope * LOG2_E * cubic),
                                          _mm512_set1_ps(-slope * LOG2_E));
    const __m512 power = exp2_of(_mm512_mul_ps(x, factor));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), power)));
}

// One row's 32 outputs of a panel.
INLINE void finish(const Product *p, int64_t row, int panel, const float *sums, const float *gate) {
    __m512 values[2];
    for (int half = 0; half < 2; half++) {
        const int c = half * LANES, column = panel * BLOCK + c;
        const __mmask16 lanes = first_lanes(p->outputs - column);
        values[half] = _mm512_add_ps(_mm512_loadu_ps(sums + c), load(p->bias + column, lanes));
        if (gate) {
            const __m512 gates = _mm512_add_ps(_mm512_loadu_ps(gate + c), load(p->gate_bias + column, lanes));
            values[half] = _mm512_mul_ps(values[half], activated(gates, p->slope, p->cubic));
        } else if (p->how & ACTIVATED) {
            values[half] = activated(values[half], p->slope, p->cubic);
        }
        if (p->how & ADDED)
            values[half] = _mm512_add_ps(values[half], load(p->out + row * p->outputs + column, lanes));
    }
    const __m512i whole = (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]);
    if (p->how & IN_BLOCKS) {
        _mm512_storeu_si512(p->out + in_blocks(row, panel, in_whole(p->outputs, BLOCK) / BLOCK), whole);
    } else {
        const int left = p->outputs - panel * BLOCK;
        const __mmask32 lanes = left >= BLOCK ? 0xFFFFFFFFu : (1u << left) - 1;
        _mm512_mask_storeu_epi16(p->out + row * p->outputs + panel * BLOCK, lanes, whole);
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

static void finish_rotated(const Product *p, Range rows, Range panels, Sums *sums) {
    _Alignas(64) float line[MAX_GROUP * BLOCK + LANES];
    const int first_column = panels.first * BLOCK;
    const int columns = least((panels.stop - panels.first) * BLOCK, p->outputs - first_column);
    for (int row = rows.first; row < rows.stop; row++) {
        const int block = (row - rows.first) / BLOCK, within = (row - rows.first) % BLOCK;
        for (int c = 0; c < columns; c += LANES) {
            const __m512 bias = load(p->bias + first_column + c, first_lanes(columns - c));
            const float *from = sums[c / BLOCK * 2 + block][within] + c % BLOCK;
            _mm512_store_ps(line + c, _mm512_add_ps(_mm512_loadu_ps(from), bias));
        }
        finish_heads(p, row, first_column, columns, line);
    }
}

static void finish_group(const Product *p, Range rows, Range panels, Sums *sums) {
    const int gated = p->gate_bias != 0, each = 1 + gated;
    for (int panel = panels.first; panel < panels.stop; panel += each, sums += each * 2)
        for (int row = rows.first; row < rows.stop; row++) {
            const int block = (row - rows.first) / BLOCK, line = (row - rows.first) % BLOCK;
            finish(p, row, panel / each, sums[gated * 2 + block][line], gated ? sums[block][line] : 0);
        }
}
