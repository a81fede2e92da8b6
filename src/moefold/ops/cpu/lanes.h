/* Eight numbers at a time, or sixteen where a processor can, and fewer at the end of a row. */

#ifndef MOEFOLD_LANES_H
#define MOEFOLD_LANES_H

#include "experts.h"
#include <immintrin.h>

enum { LANES = 8 };

/* All lanes, or the first few. */
INLINE __m256i lanes(int count)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The next numbers, zeros beyond the end. */
INLINE __m256 read(const float *at, int count)
{
    return count >= LANES ? _mm256_loadu_ps(at) : _mm256_maskload_ps(at, lanes(count));
}

/* Eight numbers of a kind as float32: a bfloat16 is the upper half of one. */
INLINE __m256 widen(const int kind, __m128i numbers)
{
    if (kind == FLOAT16)
        return _mm256_cvtph_ps(numbers);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
}

/* Bytes of a number. */
INLINE long size_of(const int kind) { return kind == ROUNDED ? 8 : kind == FLOAT32 ? 4 : 2; }

/* Where a number lies. */
INLINE const void *number(const int kind, const void *at, long place)
{
    return (const char *)at + place * size_of(kind);
}

/* `read` of numbers of a kind. */
INLINE __m256 read_kind(const int kind, const void *at, long place, int count)
{
    const void *here = number(kind, at, place);
    if (kind == FLOAT32)
        return read(here, count);
#if HAS_PAIRS
    if (kind == ROUNDED) {
        const __mmask16 own = count >= LANES ? 0xffff : (1u << 2 * count) - 1;
        return (__m256)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(own, here));
    }
#endif
    if (count >= LANES)
        return widen(kind, _mm_loadu_si128(here));
    uint16_t few[LANES] = {0};
    for (int i = 0; i < count; i++)
        few[i] = ((const uint16_t *)here)[i];
    return widen(kind, _mm_loadu_si128((const __m128i *)few));
}

INLINE void write(float *at, int count, __m256 numbers)
{
    if (count >= LANES)
        _mm256_storeu_ps(at, numbers);
    else
        _mm256_maskstore_ps(at, lanes(count), numbers);
}

/* Eight numbers as those of a kind of two bytes, the nearest ones, of two the even one. The
 * instruction for bfloat16 takes numbers below the smallest normal one for 0. */
INLINE __m128i narrow(const int kind, __m256 numbers)
{
    if (kind == FLOAT16)
        return _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#if HAS_PAIRS
    return (__m128i)_mm256_cvtneps_pbh(numbers);
#else
    const __m256i bits = _mm256_castps_si256(numbers);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_add_epi32(bits, half);
    /* What is not a number could become zero that way: it keeps its upper half. */
    const __m256 no_number = _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q);
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(
        rounded, bits, _mm256_castps_si256(no_number)), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
#endif
}

/* Write as numbers of a kind. */
INLINE void write_kind(const int kind, void *at, long place, int count, __m256 numbers)
{
    void *here = (void *)number(kind, at, place);
    if (kind == FLOAT32) {
        write(here, count, numbers);
        return;
    }
    const __m128i made = narrow(kind, numbers);
    if (count >= LANES) {
        _mm_storeu_si128(here, made);
        return;
    }
    uint16_t few[LANES];
    _mm_storeu_si128((__m128i *)few, made);
    for (int i = 0; i < count; i++)
        ((uint16_t *)here)[i] = few[i];
}

/* A number of a kind as float32. */
INLINE float one_of(const int kind, const void *at, long place)
{
    if (kind == FLOAT32)
        return ((const float *)at)[place];
    return _mm256_cvtss_f32(widen(kind, _mm_cvtsi32_si128(((const uint16_t *)at)[place])));
}

/* Where a number of bfloat16 lies, or one of float32. */
INLINE void *at_number(int is_low, void *start, long place)
{
    return (void *)number(is_low ? BFLOAT16 : FLOAT32, start, place);
}

/* Write `columns` numbers to a row, from `column` on, or add them, or write them as bfloat16. Not
 * inline: a loop before it would have no registers left for its sums. */
static __attribute__((noinline, unused)) void write_out(
    int rounds, void *row, long column, const float *from, int columns, int add)
{
    float *at = (float *)row + column;
    for (int i = 0; i < columns; i += LANES) {
        const int count = least(LANES, columns - i);
        const __m256 numbers = read(from + i, count);
        if (rounds)
            write_kind(BFLOAT16, row, column + i, count, numbers);
        else
            write(at + i, count, add ? _mm256_add_ps(read(at + i, count), numbers) : numbers);
    }
}

/* As many numbers as the widest vectors have. */
#ifdef __AVX512F__
typedef __m512 Vector;
#define VECTOR(operation) _mm512_##operation
enum { SPAN = 16 };

INLINE __mmask16 first_of(int count) { return count >= SPAN ? 0xffff : (1u << count) - 1; }

#if HAS_PAIRS
/* Up to 32 numbers of float32 as bfloat16. */
INLINE __m512i read_rounded(const float *at, int count)
{
    const __m512 low = _mm512_maskz_loadu_ps(first_of(count), at);
    const __m512 high = _mm512_maskz_loadu_ps(first_of(most(count - SPAN, 0)), at + SPAN);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#endif

INLINE Vector read_vector(const int kind, const void *at, long place, int count)
{
    const void *here = number(kind, at, place);
    const __mmask16 own = first_of(count);
#if HAS_PAIRS
    if (kind == ROUNDED)
        return _mm512_castsi512_ps(read_rounded(here, 2 * count));
#endif
    if (kind == FLOAT32)
        return count >= SPAN ? _mm512_loadu_ps(here) : _mm512_maskz_loadu_ps(own, here);
    const __m256i numbers = count >= SPAN ? _mm256_loadu_si256(here)
                                          : _mm256_maskz_loadu_epi16(own, here);
    if (kind == FLOAT16)
        return _mm512_cvtph_ps(numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

INLINE void write_vector(const int kind, void *at, long place, int count, Vector numbers)
{
    void *here = (void *)number(kind, at, place);
    if (kind == FLOAT32) {
        if (count >= SPAN)
            _mm512_storeu_ps(here, numbers);
        else
            _mm512_mask_storeu_ps(here, first_of(count), numbers);
        return;
    }
    const __m128i low = narrow(kind, _mm512_castps512_ps256(numbers));
    const __m128i high = narrow(kind, _mm512_extractf32x8_ps(numbers, 1));
    const __m256i made = _mm256_set_m128i(high, low);
    if (count >= SPAN)
        _mm256_storeu_si256(here, made);
    else
        _mm256_mask_storeu_epi16(here, first_of(count), made);
}

INLINE Vector nearest_whole(Vector x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Of two vectors the one where x is above the bound, or not a number, and the other elsewhere. */
INLINE Vector where_above(Vector x, Vector bound, Vector yes, Vector no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLE_UQ), no, yes);
}

INLINE Vector as_numbers(__m512i bits) { return _mm512_castsi512_ps(bits); }
typedef __m512i Integers;

INLINE float total(Vector sums) { return _mm512_reduce_add_ps(sums); }
#else
typedef __m256 Vector;
#define VECTOR(operation) _mm256_##operation
enum { SPAN = LANES };
#define read_vector read_kind
#define write_vector write_kind

INLINE Vector nearest_whole(Vector x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Of two vectors the one where x is above the bound, or not a number, and the other elsewhere. */
INLINE Vector where_above(Vector x, Vector bound, Vector yes, Vector no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_NLE_UQ));
}

INLINE Vector as_numbers(__m256i bits) { return _mm256_castsi256_ps(bits); }
typedef __m256i Integers;

INLINE float total(Vector sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
#endif

#endif
