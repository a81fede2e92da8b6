/* Eight numbers at a time, and fewer at the end of a row. */

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

/* Where a number lies. */
INLINE const void *number(const int kind, const void *at, long place)
{
    return (const char *)at + place * (kind == FLOAT32 ? 4 : 2);
}

/* `read` of numbers of a kind. */
INLINE __m256 read_kind(const int kind, const void *at, long place, int count)
{
    const void *here = number(kind, at, place);
    if (kind == FLOAT32)
        return read(here, count);
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

/* Eight numbers as those of a kind of two bytes, the nearest ones, of two the even one. */
INLINE __m128i narrow(const int kind, __m256 numbers)
{
    if (kind == FLOAT16)
        return _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(numbers);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_add_epi32(bits, half);
    /* What is not a number could become zero that way: it keeps its upper half. */
    const __m256 no_number = _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q);
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(
        rounded, bits, _mm256_castps_si256(no_number)), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
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

INLINE float total(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

#endif
