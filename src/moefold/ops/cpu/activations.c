/* Activations and their derivatives, with all that is computed number by number beside them, in one
 * pass over an expert's hidden rows. For x86-64 with AVX2 and FMA, or AVX-512; slow twin:
 * `fused_hidden.py`.
 *
 * Every number is computed by the same instructions, wherever it lies in a row.
 */

#include "experts.h"
#include "lanes.h"

#define ALL VECTOR(set1_ps)

INLINE Vector polynomial(Vector x, int degree, const float *coefficients)
{
    Vector sum = ALL(coefficients[degree]);
    for (int i = degree - 1; i >= 0; i--)
        sum = VECTOR(fmadd_ps)(sum, x, ALL(coefficients[i]));
    return sum;
}

/* e^x, within 2 units in the last place: 2^n e^r with |r| <= ln(2)/2; e^r = 1 + r + r^2 P(r) with P
 * fitted for the least largest error. Not a number stays so: the second operand of min and max is
 * returned then. */
INLINE Vector exponential(Vector x)
{
    static const float p[] = {0.49999994f, 0.166665152f, 0.041668456f, 0.00836941879f,
                              0.00138131448f};
    x = VECTOR(min_ps)(ALL(89), VECTOR(max_ps)(ALL(-104), x)); /* infinity and 0 from there on */
    const Vector n = nearest_whole(VECTOR(mul_ps)(x, ALL(1.44269504f)));
    Vector r = VECTOR(fnmadd_ps)(n, ALL(0.693145752f), x); /* ln(2), its first bits and the rest */
    r = VECTOR(fnmadd_ps)(n, ALL(1.42860677e-6f), r);
    const Vector squared = VECTOR(mul_ps)(r, r);
    const Vector power = VECTOR(add_ps)(VECTOR(fmadd_ps)(squared, polynomial(r, 4, p), r), ALL(1));
    /* In two steps, because 2^n alone may be too large or too small for a float. */
    const Integers all = VECTOR(cvtps_epi32)(n), half = VECTOR(srai_epi32)(all, 1);
    const Integers rest = VECTOR(sub_epi32)(all, half), bias = VECTOR(set1_epi32)(127);
    const Integers one = VECTOR(slli_epi32)(VECTOR(add_epi32)(half, bias), 23);
    const Integers other = VECTOR(slli_epi32)(VECTOR(add_epi32)(rest, bias), 23);
    return VECTOR(mul_ps)(VECTOR(mul_ps)(power, as_numbers(one)), as_numbers(other));
}

INLINE Vector sigmoid(Vector x)
{
    const Vector e = exponential(VECTOR(sub_ps)(VECTOR(setzero_ps)(), x));
    return VECTOR(div_ps)(ALL(1), VECTOR(add_ps)(ALL(1), e));
}

/* The error function, within 2 units in the last place: t + t P(t^2) below 0.9, and 1 - e^Q(t)
 * above, with P and Q fitted for the least largest error. From 4 on it is 1. */
INLINE Vector error_function(Vector x)
{
    static const float p[] = {0.128379151f, -0.376125246f, 0.112821408f, -0.0267789084f,
                              0.00501196226f, -0.000609035778f};
    static const float q[] = {-0.000177495502f, -1.12774956f, -0.637059748f, -0.104037352f,
                              0.0222770851f, -0.00305560674f, 0.000197181653f};
    const Vector sign = VECTOR(and_ps)(x, ALL(-0.0f)), t = VECTOR(andnot_ps)(ALL(-0.0f), x);
    const Vector near = VECTOR(fmadd_ps)(t, polynomial(VECTOR(mul_ps)(t, t), 5, p), t);
    const Vector within = VECTOR(min_ps)(ALL(4), t);
    const Vector far = VECTOR(sub_ps)(ALL(1), exponential(polynomial(within, 6, q)));
    return VECTOR(or_ps)(where_above(t, ALL(0.9f), far, near), sign);
}

/* An activation and its derivative. */
typedef struct {
    Vector value, slope;
} Activated;

INLINE Activated activated(const int kind, Vector x)
{
    const Vector one = ALL(1);
    if (kind == RELU) {
        const Vector zero = VECTOR(setzero_ps)();
        return (Activated){VECTOR(max_ps)(zero, x), where_above(x, zero, one, zero)};
    }
    if (kind == SILU) {
        const Vector s = sigmoid(x), rest = VECTOR(sub_ps)(one, s);
        return (Activated){VECTOR(mul_ps)(x, s),
                           VECTOR(mul_ps)(s, VECTOR(fmadd_ps)(x, rest, one))};
    }
    if (kind == GELU) {
        const Vector half = ALL(0.5f);
        const Vector erf = error_function(VECTOR(mul_ps)(x, ALL(0.707106781f)));
        const Vector below = VECTOR(fmadd_ps)(half, erf, half); /* the normal distribution, */
        const Vector power = VECTOR(mul_ps)(VECTOR(mul_ps)(x, x), ALL(-0.5f));
        const Vector at = VECTOR(mul_ps)(exponential(power), ALL(0.398942280f)); /* its density */
        return (Activated){VECTOR(mul_ps)(x, below), VECTOR(fmadd_ps)(x, at, below)};
    }
    /* (1 + tanh(u)) / 2 is a sigmoid of 2 u, with 2 u = x (a + b x^2). */
    const float a = 1.59576912f, b = 0.0713548162f;
    const Vector squared = VECTOR(mul_ps)(x, x);
    const Vector s = sigmoid(VECTOR(mul_ps)(x, VECTOR(fmadd_ps)(squared, ALL(b), ALL(a))));
    const Vector inner = VECTOR(fmadd_ps)(squared, ALL(3 * b), ALL(a));
    const Vector slope = VECTOR(mul_ps)(VECTOR(mul_ps)(s, VECTOR(sub_ps)(one, s)), inner);
    return (Activated){VECTOR(mul_ps)(x, s), VECTOR(fmadd_ps)(x, slope, s)};
}

INLINE void activate_rows(const int kind, const int numbers, const Hidden *given)
{
    const long width = given->width;
    for (long row = 0; row < given->rows; row++) {
        const long start = row * width, hidden = row * given->stride;
        for (int i = 0; i < width; i += SPAN) {
            const int count = width - i;
            Vector h = activated(kind, read_vector(numbers, given->pre, start + i, count)).value;
            if (given->value)
                h = VECTOR(mul_ps)(h, read_vector(numbers, given->value, start + i, count));
            write_vector(numbers, given->hidden, hidden + i, count, h);
        }
    }
}

INLINE void differentiate_rows(const int kind, const int kept, const int kind_made,
                               const Hidden *given)
{
    const long width = given->width;
    for (long row = 0; row < given->rows; row++) {
        const long start = row * width, hidden = row * given->stride, of = row * given->of_stride;
        const Vector weight = ALL(given->weights ? given->weights[row] : 1);
        Vector sums = VECTOR(setzero_ps)();
        for (int i = 0; i < width; i += SPAN) {
            const int count = width - i;
            const Activated made = activated(kind, read_vector(kept, given->pre, start + i, count));
            const Vector other =
                given->value ? read_vector(kept, given->value, start + i, count) : ALL(1);
            const Vector h = VECTOR(mul_ps)(made.value, other);
            write_vector(kind_made, given->hidden, hidden + i, count, VECTOR(mul_ps)(weight, h));
            if (!given->of_hidden)
                continue;
            const Vector gradient =
                read_vector(kind_made, given->of_hidden, row * given->grad_stride + i, count);
            const Vector weighted = VECTOR(mul_ps)(weight, gradient);
            sums = VECTOR(add_ps)(sums, VECTOR(mul_ps)(gradient, h));
            if (given->of_value)
                write_vector(kind_made, given->of_value, of + i, count,
                           VECTOR(mul_ps)(weighted, made.value));
            if (given->of_pre)
                write_vector(kind_made, given->of_pre, of + i, count,
                           VECTOR(mul_ps)(made.slope, VECTOR(mul_ps)(weighted, other)));
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

EXPORT void moefold_activate(const Hidden *given)
{
    if (given->made == FLOAT32)
        BY_KIND(activate_rows, FLOAT32, given)
    else
        BY_KIND(activate_rows, BFLOAT16, given)
}

EXPORT void moefold_differentiate(const Hidden *given)
{
    if (given->made == BFLOAT16) { /* then that is what is kept, too */
        BY_KIND(differentiate_rows, BFLOAT16, BFLOAT16, given)
        return;
    }
    switch (given->kept) {
    case FLOAT32: BY_KIND(differentiate_rows, FLOAT32, FLOAT32, given) break;
    case BFLOAT16: BY_KIND(differentiate_rows, BFLOAT16, FLOAT32, given) break;
    default: BY_KIND(differentiate_rows, FLOAT16, FLOAT32, given)
    }
}
