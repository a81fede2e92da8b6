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

INLINE void write(float *at, int count, __m256 numbers)
{
    if (count >= LANES)
        _mm256_storeu_ps(at, numbers);
    else
        _mm256_maskstore_ps(at, lanes(count), numbers);
}

INLINE float total(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

#endif
