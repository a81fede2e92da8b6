/* Tiles of a product: up to 6 rows of 16 numbers, whose sums stay in registers. */

#ifndef MOEFOLD_TILES_H
#define MOEFOLD_TILES_H

#include "experts.h"
#include <immintrin.h>

enum {
    HEIGHT = 6, /* rows and columns that one pass over the depth makes, */
    WIDTH = 16, /* with 12 of 16 registers */
};

/* What to fetch while computing: two lines for every 16 steps of depth. */
typedef struct {
    const char *one, *other;
    long step; /* in bytes */
} Ahead;

/* As written: compilers would use a form that needs copies of the accumulators. */
#define MULTIPLY_ADD(sum, one, other) \
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(one), "x"(other))

#define ROW(i) \
    if (height > i) { \
        const __m256 factor = _mm256_set1_ps(packed ? l0[k * HEIGHT + i] : l##i[k]); \
        MULTIPLY_ADD(low##i, factor, right_low); \
        MULTIPLY_ADD(high##i, factor, right_high); \
    }

#define AT(step) { \
    const long k = step; \
    const __m256 right_low = _mm256_load_ps(right + k * WIDTH); \
    const __m256 right_high = _mm256_load_ps(right + k * WIDTH + 8); \
    ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) \
}

#define ADVANCE(steps) { \
    right += steps * WIDTH; \
    l0 += packed ? steps * HEIGHT : steps; \
    l1 += steps; l2 += steps; l3 += steps; l4 += steps; l5 += steps; \
}

#define STORE(i) \
    if (height > i) { \
        float *at = out[i] + column; \
        if (bias) { \
            low##i = _mm256_add_ps(low##i, _mm256_loadu_ps(bias)); \
            high##i = _mm256_add_ps(high##i, _mm256_loadu_ps(bias + 8)); \
        } \
        if (scale) { \
            low##i = _mm256_mul_ps(low##i, _mm256_set1_ps(scale[i])); \
            high##i = _mm256_mul_ps(high##i, _mm256_set1_ps(scale[i])); \
        } \
        if (add) { \
            low##i = _mm256_add_ps(_mm256_loadu_ps(at), low##i); \
            high##i = _mm256_add_ps(_mm256_loadu_ps(at + 8), high##i); \
        } \
        _mm256_storeu_ps(at, low##i); \
        _mm256_storeu_ps(at + 8, high##i); \
    }

/* A tile of the result: `height` rows of 16 numbers, at `column` of the rows `out`.
 * The left factor is `height` rows, from `first` on, or packed, as `pack_left` makes it. */
INLINE void tile(const int height, const int packed, int depth, const float *const *left,
                 long first, const float *right, float *const *out, long column, Finish finish,
                 Ahead ahead)
{
    __m256 low0, low1, low2, low3, low4, low5, high0, high1, high2, high3, high4, high5;
    low0 = low1 = low2 = low3 = low4 = low5 = _mm256_setzero_ps();
    high0 = high1 = high2 = high3 = high4 = high5 = _mm256_setzero_ps();
    const float *const bias = finish.bias, *const scale = finish.scale;
    const int add = finish.add;
    if (!packed) /* where sums go may be far away; a row of tiles fetches it by itself */
        for (int i = 0; i < height; i++)
            __builtin_prefetch(out[i] + column, 1, 3);
    const float *l0 = left[0] + first;
    const float *l1 = !packed && height > 1 ? left[1] + first : l0;
    const float *l2 = !packed && height > 2 ? left[2] + first : l0;
    const float *l3 = !packed && height > 3 ? left[3] + first : l0;
    const float *l4 = !packed && height > 4 ? left[4] + first : l0;
    const float *l5 = !packed && height > 5 ? left[5] + first : l0;
    for (; depth >= 16; depth -= 16) {
        __builtin_prefetch(ahead.one, 0, 2);
        ahead.one += ahead.step;
        AT(0) AT(1) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7)
        __builtin_prefetch(ahead.other, 0, 2);
        ahead.other += ahead.step;
        AT(8) AT(9) AT(10) AT(11) AT(12) AT(13) AT(14) AT(15)
        ADVANCE(16)
    }
    for (; depth; depth--) {
        AT(0)
        ADVANCE(1)
    }
    STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5)
}

#define TILE(height) \
    static __attribute__((noinline)) void tile##height( \
        int depth, const float *const *left, long first, const float *right, float *const *out, \
        long column, Finish finish, Ahead ahead) \
    { \
        tile(height, 0, depth, left, first, right, out, column, finish, ahead); \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)

typedef void Tile(int, const float *const *, long, const float *, float *const *, long, Finish,
                  Ahead);
static Tile *const TILES[HEIGHT + 1] = {0, tile1, tile2, tile3, tile4, tile5, tile6};

/* Tiles next to each other, of one packed left factor. */
#define TILES_IN_A_ROW(height) \
    static __attribute__((noinline)) void row##height( \
        int depth, const float *left, const float *right, float *const *out, long column, \
        int tiles, int add) \
    { \
        const Ahead nothing = {(const char *)left, (const char *)left, 0}; \
        for (; tiles; tiles--, right += (long)depth * WIDTH, column += WIDTH) { \
            for (int i = 0; i < height; i++) \
                __builtin_prefetch(out[i] + column, 1, 3); \
            tile(height, 1, depth, &left, 0, right, out, column, (Finish){0, 0, add}, nothing); \
        } \
    }
TILES_IN_A_ROW(1) TILES_IN_A_ROW(2) TILES_IN_A_ROW(3)
TILES_IN_A_ROW(4) TILES_IN_A_ROW(5) TILES_IN_A_ROW(6)

typedef void Row(int, const float *, const float *, float *const *, long, int, int);
static Row *const ROW_OF_TILES[HEIGHT + 1] = {0, row1, row2, row3, row4, row5, row6};

#endif
