/* What the C files of this folder share. Computed is in float32, whatever is read and written, but
 * for products of pairs of bfloat16 numbers. Strides count numbers where nothing else is said. */

#ifndef MOEFOLD_EXPERTS_H
#define MOEFOLD_EXPERTS_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* Whether there is an instruction that multiplies pairs of bfloat16 numbers. */
#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

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

/* Numbers of parameters, of tokens, and of what is kept for the backward pass; and two of float32
 * that are read as a pair of bfloat16. */
enum { FLOAT32, BFLOAT16, FLOAT16, ROUNDED };

/* A matrix that rows are multiplied by: it lies as [depth, columns], or if `turned` as
 * [columns, depth]. If `paired`, rows are bfloat16 and multiplied pair by pair, and the matrix is
 * that, too, or float32 and rounded as it is read: then the depth is even, and so are all strides
 * along which a row of pairs is found. */
typedef struct {
    const void *at;
    long stride;
    int turned, kind, paired;
} Factor;

/* What becomes of a product: (product + bias) times the row's scale, written, or added, or written
 * as bfloat16 (if `paired`, and up to MOST_DEPTH numbers deep). */
typedef struct {
    const float *bias, *scale; /* or 0 */
    int add, rounds;
} Finish;

/* out[rows, columns] = left[rows, depth] @ right, finished. Strides of `left` count four bytes. */
void product(int rows, int columns, int depth, Matrix left, Factor right, Matrix out,
             Finish finish, float *room);

/* out[lefts, rights] = left.T @ right, of left[depth, lefts] and right[depth, rights]: sums over
 * what are rows elsewhere. If `paired`, both are bfloat16, and strides count their numbers; so is
 * `out` if `rounds`, which is for up to MOST_ROUNDED rows. */
void sum(int paired, int rounds, int lefts, int rights, int depth, Matrix left, Matrix right,
         Matrix out, float *room);
enum { MOST_ROUNDED = 1024, MOST_DEPTH = 8192 };

/* How many floats `room` has for both, aligned to 64 bytes. */
long moefold_room(void);

/* activations.c */

enum { RELU, SILU, GELU, GELU_TANH };

/* Numbers of every row of an expert's hidden layer; what is not there is 0. Rows follow each other
 * in `pre` and `value`, and lie `stride` apart in `hidden`, `grad_stride` in `of_hidden`. */
typedef struct {
    int kind, rows, width, kept, made;
    const void *pre, *value; /* of the kind `kept`; forward that is also the kind `made` */
    long stride;
    void *hidden; /* of the kind `made`, as all gradients but the last */
    /* Of the gradient alone. */
    const float *weights;
    const void *of_hidden;
    void *of_pre, *of_value;
    float *of_weights;
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
