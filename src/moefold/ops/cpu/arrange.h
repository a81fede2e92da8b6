/* Factors of a product arranged as tiles read them, and what is to be fetched next. */

#ifndef MOEFOLD_ARRANGE_H
#define MOEFOLD_ARRANGE_H

#include "tiles.h"

enum { CALLS = 8 }; /* of a tile, in which the next columns are fetched */

/* Eight rows of eight numbers become eight columns. */
INLINE void transpose(const int kind, const void *from, long stride, float *out)
{
    __m256 row[8], pair[8], four[8];
    for (int i = 0; i < 8; i++)
        row[i] = read_kind(kind, from, i * stride, LANES);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_store_ps(out + i * WIDTH, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_store_ps(out + (i + 4) * WIDTH, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

/* Up to WIDTH columns of a right factor [depth, columns] as [depth, WIDTH], zeros elsewhere. */
INLINE void pack_right(const int kind, int depth, int columns, const void *from, long stride,
                       const int64_t *index, float *out)
{
    for (int k = 0; k < depth; k++, out += WIDTH) {
        const void *row = number(kind, from, place(index, k) * stride);
        for (int i = 0; i < WIDTH; i += LANES)
            _mm256_store_ps(out + i, i < columns ? read_kind(kind, row, i, columns - i)
                                                 : _mm256_setzero_ps());
    }
}

/* The same of a right factor that lies as [columns, depth]. */
INLINE void pack_turned(const int kind, int depth, int columns, const void *from, long stride,
                        float *out)
{
    const int whole = columns / 8 * 8;
    int k = 0;
    for (; k + 8 <= depth; k += 8)
        for (int i = 0; i < whole; i += 8)
            transpose(kind, number(kind, from, k + i * stride), stride, out + k * WIDTH + i);
    for (int row = 0; row < depth; row++)
        for (int i = row < k ? whole : 0; i < WIDTH; i++)
            out[row * WIDTH + i] =
                i < columns ? _mm256_cvtss_f32(read_kind(kind, from, i * stride + row, 1)) : 0;
}

/* Up to 32 numbers of bfloat16, or of float32 rounded to it. */
#if HAS_PAIRS
INLINE __m512i read_low(const int kind, const void *at, int count)
{
    if (kind == FLOAT32)
        return read_rounded(at, count);
    return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffff : (1u << count) - 1, at);
}
#endif

/* Up to `width` columns of rows, two rows at a time: pairs, of a number and the one below it. Rows
 * are bfloat16, or float32 where the width is 32. Below the last of an odd number of rows are
 * zeros, as there are beside the columns. */
INLINE void pack_pairs(const int kind, const int width, int rows, int columns, const void *from,
                       long stride, const int64_t *index, float *out)
{
#if HAS_PAIRS
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int k = 0; k < rows; k += 2, out += width) {
        const int both = k + 1 < rows;
        const void *row = number(kind, from, place(index, k) * stride);
        const void *below = both ? number(kind, from, place(index, k + 1) * stride) : row;
        if (width == 8) {
            const __mmask8 own = columns >= 8 ? 0xff : (1u << columns) - 1;
            const __m128i one = _mm_maskz_loadu_epi16(own, row);
            const __m128i two = _mm_maskz_loadu_epi16(both ? own : 0, below);
            _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16(one, two));
            _mm_storeu_si128((__m128i *)(out + 4), _mm_unpackhi_epi16(one, two));
            continue;
        }
        const __m512i one = read_low(kind, row, columns);
        const __m512i two = read_low(kind, below, both ? columns : 0);
        _mm512_store_si512(out, _mm512_permutex2var_epi16(one, low, two));
        _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(one, high, two));
    }
#endif
}

#define PACK(kind) \
    if (right.turned) \
        pack_turned(kind, depth, columns, from, right.stride, out); \
    else \
        pack_right(kind, depth, columns, from, right.stride, 0, out)

/* Any of these, of a part of a factor that begins at `from`. */
static void pack(int depth, int columns, Factor right, const void *from, float *out)
{
    if (right.paired && !right.turned) {
        if (right.kind == FLOAT32)
            pack_pairs(FLOAT32, WIDTH, 2 * depth, columns, from, right.stride, 0, out);
        else
            pack_pairs(BFLOAT16, WIDTH, 2 * depth, columns, from, right.stride, 0, out);
        return;
    }
    switch (right.kind) {
    case ROUNDED: pack_turned(ROUNDED, depth, columns, from, right.stride, out); break;
    case FLOAT32: PACK(FLOAT32); break;
    case BFLOAT16: PACK(BFLOAT16); break;
    default: PACK(FLOAT16);
    }
}

/* Columns of a left factor that lies as [depth, columns], a few at a time as [depth, HEIGHT]. */
static void pack_left(int depth, int columns, const float *from, long stride,
                      const int64_t *index, float *out)
{
    for (int i = 0; i < columns; i += HEIGHT, from += HEIGHT)
        for (int k = 0; k < depth; k++, out += HEIGHT) {
            const float *row = from + place(index, k) * stride;
            if (i + 8 <= columns) /* what comes next overwrites what is too much */
                _mm256_storeu_ps(out, _mm256_loadu_ps(row));
            else
                for (int j = 0; j < HEIGHT; j++)
                    out[j] = i + j < columns ? row[j] : 0;
        }
}

static void arrange_right(int paired, int rows, int columns, Matrix from, long column, float *out)
{
    const void *at = at_number(paired, from.at, column);
    if (paired)
        pack_pairs(BFLOAT16, WIDTH, rows, columns, at, from.stride, from.index, out);
    else
        pack_right(FLOAT32, rows, columns, at, from.stride, from.index, out);
}

static void arrange_left(int paired, int rows, int columns, Matrix from, long column, float *out)
{
    const void *at = at_number(paired, from.at, column);
    if (!paired) {
        pack_left(rows, columns, at, from.stride, from.index, out);
        return;
    }
    for (int i = 0; i < columns; i += HEIGHT)
        pack_pairs(BFLOAT16, HEIGHT, rows, least(HEIGHT, columns - i), (const uint16_t *)at + i,
                   from.stride, from.index, out + (long)i * ((rows + 1) / 2));
}

/* The next columns of a right factor of so many rows: some of them in each of CALLS calls, or of a
 * part of the rows, whose numbers are in one line or in two. */
static Ahead next_columns(Factor right, const void *here, int rows, int call)
{
    const long size = size_of(right.kind), stride = size * right.stride;
    if (right.turned) {
        const char *column = (const char *)here + (WIDTH + WIDTH / CALLS * call) * stride;
        const long again = right.kind == ROUNDED ? 64 : 0;
        return (Ahead){column, column + stride, 2 * stride, 16 * size, again};
    }
    const char *row = (const char *)here + WIDTH * size + (long)call * (rows / CALLS) * stride;
    if (WIDTH * size > 64) {
        const long again = right.paired ? 2 * stride : 0;
        return (Ahead){row, row + 64, stride, 2 * stride + again, again};
    }
    return (Ahead){row, row + stride, 2 * stride, WIDTH / CALLS * stride, 0};
}

#endif
