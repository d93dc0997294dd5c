// AMX's tiles: eight registers of 16 rows of 64 bytes. Macros, for an instruction names its tiles by literal numbers.
//
// Written as assembler and not as the compiler's intrinsics, whose loads do not say that they read memory: what was
// stored before may then be stored after. With AMX_EMULATED, for tests on other CPUs, the same in plain C.

#pragma once

#include "cpu_vectors.h"

enum {
    TILE_ROWS = 16,
    TILE_PAIRS = 16,                                // pairs of bfloat16 in a tile's row
    TILE_VALUES = TILE_ROWS * 2 * TILE_PAIRS,       // of a whole tile, in bfloat16
};

#ifndef AMX_EMULATED

// A thread's tiles, all of them whole. Needs the kernel's permission, which a process asks for once.
static void begin_tiles(void) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shape.row_bytes[tile] = 64;
        shape.rows[tile] = TILE_ROWS;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}

static void end_tiles(void) { __asm__ volatile("tilerelease"); }

#define ZERO_TILE(T) __asm__ volatile("tilezero %%tmm" #T : :)
#define LOAD_TILE(T, FROM, STRIDE_BYTES) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T : : "r"(FROM), "r"((int64_t)(STRIDE_BYTES)) : "memory")
#define STORE_TILE(T, TO, STRIDE_BYTES) \
    __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" : : "r"(TO), "r"((int64_t)(STRIDE_BYTES)) : "memory")
// SUMS, float [16, 16], += LEFT [16, 16 pairs] · RIGHT [16 pairs, 16].
#define MULTIPLY_TILES(SUMS, LEFT, RIGHT) __asm__ volatile("tdpbf16ps %%tmm" #RIGHT ", %%tmm" #LEFT ", %%tmm" #SUMS : :)

#else

static _Thread_local uint32_t tiles[8][TILE_ROWS][TILE_PAIRS];

static void begin_tiles(void) { memset(tiles, 0, sizeof tiles); }
static void end_tiles(void) {}

static float high_half(uint32_t pair, int shift) {
    const uint32_t bits = pair << shift & 0xFFFF0000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void multiply_emulated(int sums, int left, int right) {
    for (int row = 0; row < TILE_ROWS; row++)
        for (int column = 0; column < LANES; column++) {
            float sum;
            memcpy(&sum, &tiles[sums][row][column], sizeof sum);
            for (int pair = 0; pair < TILE_PAIRS; pair++)
                for (int shift = 16; shift >= 0; shift -= 16)
                    sum += high_half(tiles[left][row][pair], shift) * high_half(tiles[right][pair][column], shift);
            memcpy(&tiles[sums][row][column], &sum, sizeof sum);
        }
}

#define ZERO_TILE(T) memset(tiles[T], 0, sizeof tiles[T])
#define LOAD_TILE(T, FROM, STRIDE_BYTES) \
    for (int r = 0; r < TILE_ROWS; r++) memcpy(tiles[T][r], (const char *)(FROM) + r * (int64_t)(STRIDE_BYTES), 64)
#define STORE_TILE(T, TO, STRIDE_BYTES) \
    for (int r = 0; r < TILE_ROWS; r++) memcpy((char *)(TO) + r * (int64_t)(STRIDE_BYTES), tiles[T][r], 64)
#define MULTIPLY_TILES(SUMS, LEFT, RIGHT) multiply_emulated(SUMS, LEFT, RIGHT)

#endif
