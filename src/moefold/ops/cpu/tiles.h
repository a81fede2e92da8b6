/* Tiles of a product: a few rows of two vectors, whose sums stay in registers.
 *
 * A step of the depth is four bytes of a row: one number, or a pair of bfloat16 numbers, which a
 * processor that has an instruction for it multiplies with another pair and adds up in float32.
 */

#ifndef MOEFOLD_TILES_H
#define MOEFOLD_TILES_H

#include "lanes.h"

#ifdef __AVX512F__
enum { HEIGHT = 8 }; /* rows: 16 of 32 registers; addresses of more would not have one each */
#else
enum { HEIGHT = 6 }; /* likewise 12 of 16 */
#endif
enum { WIDTH = 2 * SPAN };

/* What to fetch while computing, for every 16 steps of depth: two lines, and for a wide tile two
 * more that lie `apart` from them; and if what is fetched will be rounded to pairs, and so is twice
 * as much, as many again that lie `again` from those. */
typedef struct {
    const char *one, *other;
    long apart, step, again; /* in bytes */
} Ahead;

INLINE void fetch(const int paired, const char *line, Ahead ahead)
{
    __builtin_prefetch(line, 0, 2);
    if (WIDTH == 32)
        __builtin_prefetch(line + ahead.apart, 0, 2);
    if (paired && ahead.again) {
        __builtin_prefetch(line + ahead.again, 0, 2);
        __builtin_prefetch(line + ahead.again + ahead.apart, 0, 2);
    }
}

/* As written: compilers would use a form that needs copies of the accumulators. */
#define MULTIPLY_ADD(sum, one, other) \
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(other))
#if HAS_PAIRS
#define MULTIPLY_ADD_PAIRS(sum, one, other) \
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(other))
#else
#define MULTIPLY_ADD_PAIRS MULTIPLY_ADD /* nobody has any */
#endif

#define ROW(i) \
    if (height > i) { \
        const Vector factor = VECTOR(set1_ps)(packed ? l0[k * HEIGHT + i] : l##i[k]); \
        if (paired) { \
            MULTIPLY_ADD_PAIRS(low##i, factor, right_low); \
            MULTIPLY_ADD_PAIRS(high##i, factor, right_high); \
        } else { \
            MULTIPLY_ADD(low##i, factor, right_low); \
            MULTIPLY_ADD(high##i, factor, right_high); \
        } \
    }

#define AT(step) { \
    const long k = step; \
    const Vector right_low = VECTOR(load_ps)(right + k * WIDTH); \
    const Vector right_high = VECTOR(load_ps)(right + k * WIDTH + SPAN); \
    ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) ROW(7) \
}

#define ADVANCE(steps) { \
    right += steps * WIDTH; \
    l0 += packed ? steps * HEIGHT : steps; \
    l1 += steps; l2 += steps; l3 += steps; l4 += steps; l5 += steps; l6 += steps; l7 += steps; \
}

#define STORE(i) \
    if (height > i) { \
        if (bias) { \
            low##i = VECTOR(add_ps)(low##i, VECTOR(loadu_ps)(bias)); \
            high##i = VECTOR(add_ps)(high##i, VECTOR(loadu_ps)(bias + SPAN)); \
        } \
        if (scale) { \
            low##i = VECTOR(mul_ps)(low##i, VECTOR(set1_ps)(scale[i])); \
            high##i = VECTOR(mul_ps)(high##i, VECTOR(set1_ps)(scale[i])); \
        } \
        put(rounds, add, out[i], column, low##i); \
        put(rounds, add, out[i], column + SPAN, high##i); \
    }

/* Write numbers, or add them, or write them as bfloat16. */
INLINE void put(const int rounds, int add, void *row, long column, Vector numbers)
{
#if HAS_PAIRS
    if (rounds) {
        const __m256i made = (__m256i)_mm512_cvtneps_pbh(numbers);
        _mm256_storeu_si256((__m256i *)((uint16_t *)row + column), made);
        return;
    }
#endif
    float *at = (float *)row + column;
    VECTOR(storeu_ps)(at, add ? VECTOR(add_ps)(VECTOR(loadu_ps)(at), numbers) : numbers);
}

#define LEFT(i) const float *l##i = !packed && height > i ? left[i] + first : l0

/* A tile of the result: `height` rows of WIDTH numbers, at `column` of the rows `out`.
 * The left factor is `height` rows, from `first` on, or packed, as `pack_left` makes it. */
INLINE void tile(const int paired, const int height, const int packed, const int rounds, int depth,
                 const float *const *left, long first, const float *right, void *const *out,
                 long column, Finish finish, Ahead ahead)
{
    Vector low0, low1, low2, low3, low4, low5, low6, low7;
    Vector high0, high1, high2, high3, high4, high5, high6, high7;
    low0 = low1 = low2 = low3 = low4 = low5 = low6 = low7 = VECTOR(setzero_ps)();
    high0 = high1 = high2 = high3 = high4 = high5 = high6 = high7 = VECTOR(setzero_ps)();
    const float *const bias = finish.bias, *const scale = finish.scale;
    const int add = finish.add;
    /* Where sums go may be far away. */
    for (int i = 0; i < height; i++)
        for (int j = 0; j < WIDTH; j += rounds ? 32 : 16)
            __builtin_prefetch((char *)out[i] + (column + j) * (rounds ? 2 : 4), 1, 3);
    const float *l0 = left[0] + first;
    LEFT(1); LEFT(2); LEFT(3); LEFT(4); LEFT(5); LEFT(6); LEFT(7);
    for (; depth >= 16; depth -= 16) {
        fetch(paired, ahead.one, ahead);
        ahead.one += ahead.step;
        AT(0) AT(1) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7)
        fetch(paired, ahead.other, ahead);
        ahead.other += ahead.step;
        AT(8) AT(9) AT(10) AT(11) AT(12) AT(13) AT(14) AT(15)
        ADVANCE(16)
    }
    for (; depth; depth--) {
        AT(0)
        ADVANCE(1)
    }
    STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
}

#define TILE(height) \
    static __attribute__((noinline)) void tile##height( \
        int paired, int depth, const float *const *left, long first, const float *right, \
        void *const *out, long column, Finish finish, Ahead ahead) \
    { \
        if (!paired || !HAS_PAIRS) \
            tile(0, height, 0, 0, depth, left, first, right, out, column, finish, ahead); \
        else if (finish.rounds) \
            tile(1, height, 0, 1, depth, left, first, right, out, column, finish, ahead); \
        else \
            tile(1, height, 0, 0, depth, left, first, right, out, column, finish, ahead); \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) /* up to HEIGHT is asked for */

typedef void Tile(int, int, const float *const *, long, const float *, void *const *, long, Finish,
                  Ahead);
static Tile *const TILES[] = {0, tile1, tile2, tile3, tile4, tile5, tile6, tile7, tile8};

/* Tiles next to each other, of one packed left factor; of pairs perhaps as bfloat16. */
INLINE void row_of_tiles(const int paired, const int height, const int rounds, int depth,
                         const float *left, const float *right, void *const *out, long column,
                         int tiles, int add)
{
    const Ahead nothing = {(const char *)left, (const char *)left, 0, 0, 0};
    for (; tiles; tiles--, right += (long)depth * WIDTH, column += WIDTH)
        tile(paired, height, 1, rounds, depth, &left, 0, right, out, column,
             (Finish){.add = add, .rounds = rounds}, nothing);
}

#define ROW_OF_TILES(height) \
    static __attribute__((noinline)) void row##height( \
        int paired, int rounds, int depth, const float *left, const float *right, \
        void *const *out, long column, int tiles, int add) \
    { \
        if (!paired || !HAS_PAIRS) \
            row_of_tiles(0, height, 0, depth, left, right, out, column, tiles, add); \
        else if (rounds) \
            row_of_tiles(1, height, 1, depth, left, right, out, column, tiles, 0); \
        else \
            row_of_tiles(1, height, 0, depth, left, right, out, column, tiles, add); \
    }
ROW_OF_TILES(1) ROW_OF_TILES(2) ROW_OF_TILES(3) ROW_OF_TILES(4)
ROW_OF_TILES(5) ROW_OF_TILES(6) ROW_OF_TILES(7) ROW_OF_TILES(8)

typedef void Row(int, int, int, const float *, const float *, void *const *, long, int, int);
static Row *const ROWS_OF_TILES[] = {0, row1, row2, row3, row4, row5, row6, row7, row8};

#endif
