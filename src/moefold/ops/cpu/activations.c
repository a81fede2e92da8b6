/* Activations and their derivatives, with all that is computed number by number beside them, in one
 * pass over an expert's hidden rows. For x86-64 with AVX2 and FMA; slow twin: `fused_hidden.py`.
 *
 * Every number is computed by the same instructions, wherever it lies in a row.
 */

#include "experts.h"
#include "lanes.h"

#define ALL _mm256_set1_ps

INLINE __m256 polynomial(__m256 x, int degree, const float *coefficients)
{
    __m256 sum = ALL(coefficients[degree]);
    for (int i = degree - 1; i >= 0; i--)
        sum = _mm256_fmadd_ps(sum, x, ALL(coefficients[i]));
    return sum;
}

/* e^x, within 2 units in the last place: 2^n e^r with |r| <= ln(2)/2; e^r = 1 + r + r^2 P(r) with P
 * fitted for the least largest error. Not a number stays so: the second operand of min and max is
 * returned then. */
INLINE __m256 exponential(__m256 x)
{
    static const float p[] = {0.49999994f, 0.166665152f, 0.041668456f, 0.00836941879f,
                              0.00138131448f};
    x = _mm256_min_ps(ALL(89), _mm256_max_ps(ALL(-104), x)); /* infinity and 0 from there on */
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, ALL(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, ALL(0.693145752f), x); /* ln(2), its first bits and the rest */
    r = _mm256_fnmadd_ps(n, ALL(1.42860677e-6f), r);
    const __m256 squared = _mm256_mul_ps(r, r);
    const __m256 power = _mm256_add_ps(_mm256_fmadd_ps(squared, polynomial(r, 4, p), r), ALL(1));
    /* In two steps, because 2^n alone may be too large or too small for a float. */
    const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
    const __m256i rest = _mm256_sub_epi32(all, half), bias = _mm256_set1_epi32(127);
    const __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i other = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(power, _mm256_castsi256_ps(one)),
                         _mm256_castsi256_ps(other));
}

INLINE __m256 sigmoid(__m256 x)
{
    const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
    return _mm256_div_ps(ALL(1), _mm256_add_ps(ALL(1), e));
}

/* The error function, within 2 units in the last place: t + t P(t^2) below 0.9, and 1 - e^Q(t)
 * above, with P and Q fitted for the least largest error. From 4 on it is 1. */
INLINE __m256 error_function(__m256 x)
{
    static const float p[] = {0.128379151f, -0.376125246f, 0.112821408f, -0.0267789084f,
                              0.00501196226f, -0.000609035778f};
    static const float q[] = {-0.000177495502f, -1.12774956f, -0.637059748f, -0.104037352f,
                              0.0222770851f, -0.00305560674f, 0.000197181653f};
    const __m256 sign = _mm256_and_ps(x, ALL(-0.0f)), t = _mm256_andnot_ps(ALL(-0.0f), x);
    const __m256 near = _mm256_fmadd_ps(t, polynomial(_mm256_mul_ps(t, t), 5, p), t);
    const __m256 within = _mm256_min_ps(ALL(4), t);
    const __m256 far = _mm256_sub_ps(ALL(1), exponential(polynomial(within, 6, q)));
    const __m256 is_far = _mm256_cmp_ps(t, ALL(0.9f), _CMP_GT_OQ);
    return _mm256_or_ps(_mm256_blendv_ps(near, far, is_far), sign);
}

/* An activation and its derivative. */
typedef struct {
    __m256 value, slope;
} Activated;

INLINE Activated activated(const int kind, __m256 x)
{
    const __m256 one = ALL(1);
    if (kind == RELU) {
        const __m256 off = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LE_OQ);
        return (Activated){_mm256_max_ps(_mm256_setzero_ps(), x), _mm256_andnot_ps(off, one)};
    }
    if (kind == SILU) {
        const __m256 s = sigmoid(x), rest = _mm256_sub_ps(one, s);
        return (Activated){_mm256_mul_ps(x, s),
                           _mm256_mul_ps(s, _mm256_fmadd_ps(x, rest, one))};
    }
    if (kind == GELU) {
        const __m256 half = ALL(0.5f);
        const __m256 erf = error_function(_mm256_mul_ps(x, ALL(0.707106781f)));
        const __m256 below = _mm256_fmadd_ps(half, erf, half); /* the normal distribution, */
        const __m256 power = _mm256_mul_ps(_mm256_mul_ps(x, x), ALL(-0.5f));
        const __m256 at = _mm256_mul_ps(exponential(power), ALL(0.398942280f)); /* its density */
        return (Activated){_mm256_mul_ps(x, below), _mm256_fmadd_ps(x, at, below)};
    }
    /* (1 + tanh(u)) / 2 is a sigmoid of 2 u, with 2 u = x (a + b x^2). */
    const float a = 1.59576912f, b = 0.0713548162f;
    const __m256 squared = _mm256_mul_ps(x, x);
    const __m256 s = sigmoid(_mm256_mul_ps(x, _mm256_fmadd_ps(squared, ALL(b), ALL(a))));
    const __m256 inner = _mm256_fmadd_ps(squared, ALL(3 * b), ALL(a));
    const __m256 slope = _mm256_mul_ps(_mm256_mul_ps(s, _mm256_sub_ps(one, s)), inner);
    return (Activated){_mm256_mul_ps(x, s), _mm256_fmadd_ps(x, slope, s)};
}

INLINE void activate_rows(const int kind, const Hidden *given)
{
    const float *pre = given->pre, *value = given->value;
    const long width = given->width;
    for (long row = 0; row < given->rows; row++) {
        float *hidden = given->hidden + row * given->stride;
        for (int i = 0; i < width; i += LANES) {
            const int count = width - i;
            __m256 h = activated(kind, read(pre + row * width + i, count)).value;
            if (value)
                h = _mm256_mul_ps(h, read(value + row * width + i, count));
            write(hidden + i, count, h);
        }
    }
}

INLINE void differentiate_rows(const int kind, const int kept, const Hidden *given)
{
    const long width = given->width;
    for (long row = 0; row < given->rows; row++) {
        const long start = row * width;
        float *hidden = given->hidden + row * given->stride;
        const float *of_hidden = given->of_hidden ? given->of_hidden + row * given->grad_stride : 0;
        float *of_pre = given->of_pre ? given->of_pre + row * given->of_stride : 0;
        float *of_value = given->of_value ? given->of_value + row * given->of_stride : 0;
        const __m256 weight = ALL(given->weights ? given->weights[row] : 1);
        __m256 sums = _mm256_setzero_ps();
        for (int i = 0; i < width; i += LANES) {
            const int count = width - i;
            const Activated made = activated(kind, read_kind(kept, given->pre, start + i, count));
            const __m256 other =
                given->value ? read_kind(kept, given->value, start + i, count) : ALL(1);
            const __m256 h = _mm256_mul_ps(made.value, other);
            write(hidden + i, count, _mm256_mul_ps(weight, h));
            if (!of_hidden)
                continue;
            const __m256 gradient = read(of_hidden + i, count);
            const __m256 weighted = _mm256_mul_ps(weight, gradient);
            sums = _mm256_add_ps(sums, _mm256_mul_ps(gradient, h));
            if (of_value)
                write(of_value + i, count, _mm256_mul_ps(weighted, made.value));
            if (of_pre)
                write(of_pre + i, count,
                      _mm256_mul_ps(made.slope, _mm256_mul_ps(weighted, other)));
        }
        if (given->of_weights)
            given->of_weights[row] = total(sums);
    }
}

#define BY_KIND(rows, ...) \
    switch (given->kind) { \
    case RELU: rows(RELU, __VA_ARGS__); break; \
    case SILU: rows(SILU, __VA_ARGS__); break; \
    case GELU: rows(GELU, __VA_ARGS__); break; \
    default: rows(GELU_TANH, __VA_ARGS__); \
    }

EXPORT void moefold_activate(const Hidden *given) { BY_KIND(activate_rows, given) }

EXPORT void moefold_differentiate(const Hidden *given)
{
    switch (given->kept) {
    case FLOAT32: BY_KIND(differentiate_rows, FLOAT32, given) break;
    case BFLOAT16: BY_KIND(differentiate_rows, BFLOAT16, given) break;
    default: BY_KIND(differentiate_rows, FLOAT16, given)
    }
}
