// What both kernels of attention share: how the work is divided, and rows side by side.
//
// torch's libraries hold the OpenMP runtime that the pragmas call, so that its threads are the ones that work here.

#pragma once

#include "cpu_vectors.h"

#define LOWEST -1e30f  // a score that weighs nothing; not infinite, for infinity less infinity is no number

// Queries of one head and all keys of their sequence.
typedef struct {
    const bf16 *q, *k, *v;
    bf16 *out;
    int64_t q_stride, k_stride, v_stride, out_stride;
    int num_queries, num_keys, head_size;
    float factor;  // of scores, as powers of two are raised to them
} Chunk;

INLINE int chunks_of(const int32_t *bounds, int sequence, int size) {
    return (bounds[sequence + 1] - bounds[sequence] + size - 1) / size;
}

INLINE int all_chunks(const int32_t *bounds, int sequences, int size) {
    int chunks = 0;
    for (int i = 0; i < sequences; i++) chunks += chunks_of(bounds, i, size);
    return chunks;
}

// Calls attend_chunk for all chunks of up to `size` queries, and each thread begin before and end after. Tensors are
// [N, H, D], a head's values side by side and heads too; strides are those of patches. bounds [sequences + 1] are the
// sequences' boundaries. D is even.
INLINE void over_chunks(Chunk all, const int32_t *bounds, int sequences, int heads, int size, int threads,
                        void (*begin)(void), void (*attend_chunk)(Chunk), void (*end)(void)) {
    const int chunks = all_chunks(bounds, sequences, size);
#pragma omp parallel num_threads(threads)
    {
        int sequence = 0, first_chunk = 0;
        begin();
#pragma omp for schedule(dynamic)
        for (int item = 0; item < chunks * heads; item++) {
            // A thread's items come in ascending order.
            while (item >= (first_chunk + chunks_of(bounds, sequence, size)) * heads)
                first_chunk += chunks_of(bounds, sequence++, size);
            const int64_t start = bounds[sequence], stop = bounds[sequence + 1];
            const int of_sequence = item - first_chunk * heads;
            const int64_t first = start + of_sequence / heads * size;
            const int column = of_sequence % heads * all.head_size;
            Chunk chunk = all;
            chunk.q += first * all.q_stride + column;
            chunk.k += start * all.k_stride + column;
            chunk.v += start * all.v_stride + column;
            chunk.out += first * all.out_stride + column;
            chunk.num_queries = least(size, stop - first);
            chunk.num_keys = stop - start;
            attend_chunk(chunk);
        }
        end();
    }
}

// 16 vectors of 32-bit words, such as pairs of values.
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

// 16 rows' pairs of values from `pair` on, transposed; zeros for rows after the last and pairs after a head's.
INLINE void load_pairs(const bf16 *rows, int64_t stride, int count, int head_size, int pair, __m512i word[LANES]) {
    const __mmask16 lanes = first_lanes(head_size / 2 - pair);
    for (int i = 0; i < LANES; i++)
        word[i] = i < count ? _mm512_maskz_loadu_epi32(lanes, rows + i * stride + 2 * pair) : _mm512_setzero_si512();
    transpose(word);
}

// 16 values of a row and those of the next side by side; zeros for rows after the last.
INLINE __m512i two_rows(const bf16 *at, int64_t stride, int count, __mmask16 lanes) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(count > 0 ? lanes : 0, at));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(count > 1 ? lanes : 0, at + stride));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}
