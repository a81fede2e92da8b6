/* What the C files of this folder share. Computed is in float32, whatever is read and written; all
 * strides count numbers. */

#ifndef MOEFOLD_EXPERTS_H
#define MOEFOLD_EXPERTS_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

static inline int least(int one, int other) { return one < other ? one : other; }
static inline int most(int one, int other) { return one > other ? one : other; }

/* products.c */

/* A matrix, or one of a stack: `next` after the one before. The numbers of a row follow each other,
 * rows lie `stride` apart, in the order of the index, if there is one. */
typedef struct {
    float *at;
    long next, stride;
    const int64_t *index;
} Matrix;

/* Where a row lies: after the one before, or as the index says. */
INLINE long place(const int64_t *index, long row) { return index ? index[row] : row; }

/* Numbers of parameters, of tokens, and of what is kept for the backward pass. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* A matrix that rows are multiplied by: it lies as [depth, columns], or if `turned` as
 * [columns, depth]. */
typedef struct {
    const void *at;
    long stride;
    int turned, kind;
} Factor;

/* What becomes of a product: (product + bias) times the row's scale, written or added. */
typedef struct {
    const float *bias, *scale; /* or 0 */
    int add;
} Finish;

/* out[rows, columns] = left[rows, depth] @ right, finished. */
void product(int rows, int columns, int depth, Matrix left, Factor right, Matrix out,
             Finish finish, float *room);

/* out[lefts, rights] = left.T @ right, of left[depth, lefts] and right[depth, rights]: sums over
 * what are rows elsewhere. */
void sum(int lefts, int rights, int depth, Matrix left, Matrix right, Matrix out, float *room);

/* How many floats `room` has for both, aligned to 32 bytes. */
long moefold_room(void);

/* activations.c */

enum { RELU, SILU, GELU, GELU_TANH };

/* Numbers of every row of an expert's hidden layer; what is not there is 0. Rows follow each other
 * in `pre` and `value`, and lie `stride` apart in `hidden`, `grad_stride` in `of_hidden`. */
typedef struct {
    int kind, rows, width, kept;
    const void *pre, *value; /* float32 forward, then of the kind `kept` */
    long stride;
    float *hidden;
    /* Of the gradient alone. */
    const float *weights;
    const float *of_hidden;
    float *of_pre, *of_value, *of_weights;
    long grad_stride, of_stride; /* the latter of `of_pre` and `of_value` */
} Hidden;

/* hidden = act(pre) * value. */
void moefold_activate(const Hidden *given);

/* With d the gradient at act(pre) * value for weights of 1, `of_hidden`, and w the weights:
 *     hidden     = w * act(pre) * value
 *     of_value   = w * d * act(pre)
 *     of_pre     = w * d * value * act'(pre)
 *     of_weights = sum of d * act(pre) * value over the width
 * One of the two in the middle may be written over `of_hidden`. */
void moefold_differentiate(const Hidden *given);

#endif
