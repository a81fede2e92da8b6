/* Products of a few rows with columns whose numbers follow each other: a matrix is read as it lies,
 * as fast as memory gives it, and nothing is arranged. */

#ifndef MOEFOLD_DOTS_H
#define MOEFOLD_DOTS_H

#include "tiles.h"

enum {
    FEW = WIDTH == 32 ? 24 : 3, /* rows for which this is faster than tiles, */
    LOW = WIDTH == 32 ? 6 : 3,  /* how many of them are read side by side, */
    ABREAST = 4,                /* and with how many columns */
};

/* Add the products of a few rows' and four columns' next numbers, while what comes `ahead` numbers
 * after those of the columns is fetched. */
INLINE void add_products(const int kind, const int paired, const int rows,
                         const float *const *lefts, const void *const *at, int k, int count,
                         long ahead, Vector sums[LOW][ABREAST])
{
    Vector factors[LOW];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
        factors[i] = read_vector(FLOAT32, lefts[i], k, count);
#pragma GCC unroll 6
    for (int j = 0; j < ABREAST; j++) {
        __builtin_prefetch(number(kind, at[j], ahead + k), 0, 2);
        if (kind == ROUNDED) /* of which a vector is two lines */
            __builtin_prefetch(number(kind, at[j], ahead + k + SPAN / 2), 0, 2);
        const Vector numbers = read_vector(kind, at[j], k, count);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            if (paired)
                MULTIPLY_ADD_PAIRS(sums[i][j], factors[i], numbers);
            else
                MULTIPLY_ADD(sums[i][j], factors[i], numbers);
    }
}

/* A few rows times four columns whose numbers follow each other. A number is the sum of as many
 * sums as a vector has, each of every eighth or sixteenth step. */
INLINE void dots(const int kind, const int paired, const int rows, int depth,
                 const float *const *lefts, Factor right, long column, int wide, void *const *outs,
                 Finish finish)
{
    const void *at[ABREAST];
#pragma GCC unroll 6
    for (int j = 0; j < ABREAST; j++) /* the last one again where there are fewer */
        at[j] = number(kind, right.at, (column + least(j, wide - 1)) * right.stride);
    Vector sums[LOW][ABREAST];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int j = 0; j < ABREAST; j++)
            sums[i][j] = VECTOR(setzero_ps)();
    int k = 0;
    for (; k + SPAN <= depth; k += SPAN)
        add_products(kind, paired, rows, lefts, at, k, SPAN, ABREAST * right.stride, sums);
    if (k < depth)
        add_products(kind, paired, rows, lefts, at, k, depth - k, 0, sums);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        float made[ABREAST];
#pragma GCC unroll 6
        for (int j = 0; j < wide; j++) {
            made[j] = total(sums[i][j]);
            made[j] = finish.bias ? made[j] + finish.bias[column + j] : made[j];
            made[j] = finish.scale ? made[j] * finish.scale[i] : made[j];
        }
        write_out(finish.rounds, outs[i], column, made, wide, finish.add);
    }
}

#define DOTS_OF(rows, kind, paired) \
    case rows: \
        dots(kind, paired, least(rows, LOW), depth, lefts, right, column, wide, outs, finish); \
        return;
#define DOTS(name, kind, paired) \
    static void name(int rows, int depth, const float *const *lefts, Factor right, long column, \
                     int wide, void *const *outs, Finish finish) \
    { \
        switch (rows) { \
        DOTS_OF(1, kind, paired) DOTS_OF(2, kind, paired) DOTS_OF(3, kind, paired) \
        DOTS_OF(4, kind, paired) DOTS_OF(5, kind, paired) DOTS_OF(6, kind, paired) \
        } \
    }
DOTS(dots_as_they_are, FLOAT32, 0)
DOTS(dots_in_pairs, FLOAT32, HAS_PAIRS)
DOTS(dots_rounded, ROUNDED, HAS_PAIRS)
DOTS(dots_of_bfloat16, BFLOAT16, 0)
DOTS(dots_of_float16, FLOAT16, 0)

/* `product` of up to FEW rows. */
static void few_rows(int rows, int columns, int depth, Matrix left, Factor right, Matrix out,
                     Finish finish)
{
    const float *lefts[FEW];
    void *outs[FEW];
    for (int i = 0; i < rows; i++) {
        lefts[i] = left.at + place(left.index, i) * left.stride;
        outs[i] = at_number(finish.rounds, out.at, place(out.index, i) * out.stride);
    }
    void (*of_kind)(int, int, const float *const *, Factor, long, int, void *const *, Finish) =
        right.kind == ROUNDED ? dots_rounded : right.paired && HAS_PAIRS ? dots_in_pairs :
        right.kind == FLOAT32 ? dots_as_they_are :
        right.kind == BFLOAT16 ? dots_of_bfloat16 : dots_of_float16;
    for (int column = 0; column < columns; column += ABREAST)
        for (int i = 0; i < rows; i += LOW) {
            Finish own = finish;
            own.scale = finish.scale ? finish.scale + i : 0;
            of_kind(least(LOW, rows - i), depth, lefts + i, right, column,
                    least(ABREAST, columns - column), outs + i, own);
        }
}

#endif
