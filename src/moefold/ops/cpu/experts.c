/* Experts from tokens to tokens, forward and backward, one expert after another; slow twin: the
 * operations of torch in `fused_torch.py`; the formulas are in `fused_ops.py`.
 *
 * An expert's hidden rows stay in cache between one product and the next. Rows are read at their
 * tokens and added to their tokens; none is gathered.
 */

#include "lanes.h"
#include <string.h>

/* A matrix of every expert: `next` after the one before, its rows `row` and its columns `column`
 * apart; one of both is 1. */
typedef struct {
    const void *at;
    long next, row, column;
    int kind;
} Stack;

/* Something of every token; the numbers of a token follow each other. */
typedef struct {
    const void *at;
    long stride;
    int kind;
} Tokens;

/* All experts and their rows, sorted by expert. Pointers are 0 for what is not there or not asked
 * for. `pre` and `value` hold `[rows, width]` of the kind `kept`, with zeros where an expert's next
 * one starts later; biases and gradients lie without gaps, `of_up` and `of_down` of the stacks'
 * kind. `dim` numbers in a token, `made` in a result. If `paired`, all that has a kind is bfloat16,
 * but stacks may be float32; sizes and strides are even, and products are of pairs. */
typedef struct {
    int dim, width, made, gated, activation, kept, paired;
    const int64_t *counts, *starts, *kept_starts; /* of the rows of each expert, and of all */
    const int64_t *tokens;          /* of the rows */
    const float *weights;           /* of the rows */
    const float *up_bias, *down_bias;
    void *pre, *value;
    float *of_weights;
    void *of_up, *of_down;
    float *of_up_bias, *of_down_bias;
    Tokens x, grad;
    Stack up, down;
} Experts;

/* What one thread computes: some experts. */
typedef struct {
    const int *experts;
    int count;
    float *sums; /* results by token, or gradients of x */
    float *room; /* moefold_room_for(...) floats, aligned to 64 bytes */
} Share;

/* Rows of memory of our own lie further apart than their numbers ask for: at multiples of 4 KiB
 * they would push each other out of cache. */
static long apart(int width) { return (width + 15) / 16 * 16 + 16; }

static long larger(long one, long other) { return one > other ? one : other; }

enum {
    SLAB = 1 << 18, /* numbers of a gradient that are rounded at a time, */
    SLAB_ROWS = 96, /* in a multiple of so many rows */
};

static int slab(int lefts, int rights)
{
    return least(lefts, most(SLAB / rights / SLAB_ROWS, 1) * SLAB_ROWS);
}

/* Memory of a thread for one expert: where each part of it begins, in floats, and all of it. */
typedef struct {
    long hidden;    /* [rows, width] */
    long first;     /* the first product, or its gradient: [rows, width], twice if gated */
    long gathered;  /* [rows, made] of grad, then [rows, dim] of x, if not read as they lie */
    long unrounded; /* a slab of a gradient, if that is not written as it is */
    long all;
} Room;

static Room divide(const Experts *given, long rows, int backward)
{
    const int first = (given->gated ? 2 : 1) * given->width, paired = given->paired;
    const long hidden = rows * apart(given->width) / (paired ? 2 : 1);
    const int gathers_x = !paired && given->x.kind != FLOAT32;
    const int gathers_grad = !paired && backward && given->grad.kind != FLOAT32;
    const int rounds = backward && given->up.kind != FLOAT32 && !(paired && rows <= MOST_ROUNDED);
    const long of_up = (long)slab(first, given->dim) * given->dim;
    const long of_down = (long)slab(given->made, given->width) * given->width;
    Room room = {.hidden = moefold_room()};
    room.first = room.hidden + hidden;
    room.gathered = room.first + hidden * (given->gated ? 2 : 1);
    room.unrounded = room.gathered + rows * larger(gathers_x ? apart(given->dim) : 0,
                                                   gathers_grad ? apart(given->made) : 0);
    room.all = room.unrounded + (rounds ? larger(of_up, of_down) : 0);
    return room;
}

/* Floats of it for experts of so many rows at most. */
EXPORT long moefold_room_for(const Experts *given, int rows, int backward)
{
    return divide(given, rows, backward).all;
}

/* A stack's matrix (columns from `first` on) turned over as a factor to the right of rows. */
static Factor transposed(Stack stack, int expert, long first, int paired)
{
    const int turned = stack.column == 1;
    const void *at = number(stack.kind, stack.at, expert * stack.next + first * stack.row);
    return (Factor){at, turned ? stack.row : stack.column, turned, stack.kind, paired};
}

static Factor as_it_is(Stack stack, int expert, int paired)
{
    const int turned = stack.column != 1;
    const void *at = number(stack.kind, stack.at, expert * stack.next);
    return (Factor){at, turned ? stack.column : stack.row, turned, stack.kind, paired};
}

static const float *of_expert(const float *biases, int expert, int width)
{
    return biases ? biases + (long)expert * width : 0;
}

static void widen_all(int kind, const void *from, long count, float *to)
{
    for (long i = 0; i < count; i += LANES)
        write(to + i, least(LANES, count - i), read_kind(kind, from, i, least(LANES, count - i)));
}

static void round_all(int kind, const float *from, long count, void *to)
{
    for (long i = 0; i < count; i += LANES) {
        const int some = least(LANES, count - i);
        write_kind(kind, to, i, some, read(from + i, some));
    }
}

/* What belongs to the tokens of rows as a left factor: where it lies, if it is float32 or to be
 * multiplied in pairs, or gathered into memory for it. */
static Matrix of_rows(Tokens from, const int64_t *tokens, int rows, int width, int paired,
                      float *into)
{
    if (from.kind == FLOAT32 || paired)
        return (Matrix){(float *)from.at, 0, paired ? from.stride / 2 : from.stride, tokens};
    const long stride = apart(width);
    for (int row = 0; row < rows; row++) {
        const void *at = number(from.kind, from.at, tokens[row] * from.stride);
        widen_all(from.kind, at, width, into + row * stride);
    }
    return (Matrix){into, 0, stride, 0};
}

/* The same as a factor of a sum, whose strides count numbers. */
static Matrix as_summed(Matrix rows, int paired)
{
    rows.stride *= paired ? 2 : 1;
    return rows;
}

/* Where an expert's rows of one half of the first product are kept. */
static void *kept_at(const Experts *given, void *half, int expert)
{
    return (void *)number(given->kept, half, given->kept_starts[expert] * given->width);
}

/* One half of the first product: where the backward pass looks for it, if it is kept as it is made,
 * else in memory of our own. */
static void *half_at(const Experts *given, void *half, int expert, int kind, void *own)
{
    return half && given->kept == kind ? kept_at(given, half, expert) : own;
}

/* Keep it, if that is elsewhere; zeros after it. */
static void keep(const Experts *given, const void *made, int expert, void *half)
{
    const int64_t width = given->width, rows = given->counts[expert];
    const int64_t more = given->kept_starts[expert + 1] - given->kept_starts[expert] - rows;
    if (!half)
        return;
    void *at = kept_at(given, half, expert);
    if (made != at)
        round_all(given->kept, made, rows * width, at);
    memset((void *)number(given->kept, at, rows * width), 0,
           more * width * size_of(given->kept));
}

static void forward(const Experts *given, int expert, float *sums, float *room)
{
    const int rows = (int)given->counts[expert], width = given->width;
    const int paired = given->paired, kind = paired ? BFLOAT16 : FLOAT32;
    const long start = given->starts[expert], stride = apart(width);
    const int64_t *tokens = given->tokens + start;
    const Room own = divide(given, rows, 0);
    float *hidden = room + own.hidden;
    void *first = room + own.first, *second = (void *)number(kind, first, rows * stride);
    void *pre = half_at(given, given->pre, expert, kind, first);
    void *value = half_at(given, given->value, expert, kind, second);
    const Matrix x = of_rows(given->x, tokens, rows, given->dim, paired, room + own.gathered);
    const float *bias = of_expert(given->up_bias, expert, given->gated ? 2 * width : width);
    product(rows, width, given->dim, x, transposed(given->up, expert, 0, paired),
            (Matrix){pre, 0, width, 0}, (Finish){bias, .rounds = paired}, room);
    keep(given, pre, expert, given->pre);
    if (given->gated) {
        product(rows, width, given->dim, x, transposed(given->up, expert, width, paired),
                (Matrix){value, 0, width, 0},
                (Finish){bias ? bias + width : 0, .rounds = paired}, room);
        keep(given, value, expert, given->value);
    }
    moefold_activate(&(Hidden){.kind = given->activation, .rows = rows, .width = width,
                               .pre = pre, .value = given->gated ? value : 0, .stride = stride,
                               .hidden = hidden, .kept = kind, .made = kind});
    product(rows, given->made, width, (Matrix){hidden, 0, paired ? stride / 2 : stride, 0},
            transposed(given->down, expert, 0, paired), (Matrix){sums, 0, given->made, tokens},
            (Finish){of_expert(given->down_bias, expert, given->made),
                     given->weights ? given->weights + start : 0, .add = 1}, room);
}

/* Sums over rows, each times its weight. */
static void sum_rows(int rows, int columns, Tokens from, const int64_t *index,
                     const float *weights, float *out)
{
    memset(out, 0, columns * sizeof *out);
    for (int row = 0; row < rows; row++) {
        const __m256 weight = _mm256_set1_ps(weights ? weights[row] : 1);
        const long start = place(index, row) * from.stride;
        for (int i = 0; i < columns; i += LANES) {
            const int count = least(LANES, columns - i);
            const __m256 numbers = read_kind(from.kind, from.at, start + i, count);
            write(out + i, count, _mm256_fmadd_ps(weight, numbers, read(out + i, count)));
        }
    }
}

/* Of the weights of the rows, what comes by way of the bias of the second product. */
static void add_along(int rows, int columns, Tokens grad, const int64_t *index, const float *bias,
                      float *of_weights)
{
    for (int row = 0; row < rows; row++) {
        const long start = place(index, row) * grad.stride;
        double sum = 0;
        for (int i = 0; i < columns; i++)
            sum += (double)one_of(grad.kind, grad.at, start + i) * bias[i];
        of_weights[row] += (float)sum;
    }
}

static float *part(float *whole, long numbers, long which)
{
    return whole ? whole + numbers * which : 0;
}

static void zero(float *numbers, long count)
{
    if (numbers)
        memset(numbers, 0, count * sizeof *numbers);
}

/* The gradient of one matrix of a stack, `[lefts, rights]`. */
typedef struct {
    void *at;
    int lefts, rights, kind;
} Gradient;

static Gradient gradient(void *stack, int lefts, int rights, int kind, long expert)
{
    void *at = stack ? (void *)number(kind, stack, expert * lefts * rights) : 0;
    return (Gradient){at, lefts, rights, kind};
}

static void zero_all(Gradient out)
{
    if (out.at)
        memset(out.at, 0, size_of(out.kind) * out.lefts * out.rights);
}

/* `sum`; if the gradient is not float32, slab by slab, each rounded at its end, or, in pairs, as it
 * is written. */
static void sum_to(Gradient out, int paired, int depth, Matrix left, Matrix right, float *unrounded,
                   float *room)
{
    const int rights = out.rights, is_low = out.kind != FLOAT32;
    const int at_once = is_low && paired && depth <= MOST_ROUNDED, rounds = is_low && !at_once;
    const int each = rounds ? slab(out.lefts, rights) : out.lefts;
    for (int first = 0; first < out.lefts; first += each) {
        const int some = least(each, out.lefts - first);
        void *at = (void *)number(out.kind, out.at, (long)first * rights);
        Matrix lefts = left, made = {rounds ? unrounded : at, 0, rights, 0};
        lefts.at = at_number(paired, left.at, first);
        sum(paired, at_once, some, rights, depth, lefts, right, made, room);
        if (rounds)
            round_all(out.kind, unrounded, (long)some * rights, at);
    }
}

static void backward(const Experts *given, int expert, float *sums, float *room)
{
    const int rows = (int)given->counts[expert], dim = given->dim, made = given->made;
    const int width = given->width, first = given->gated ? 2 * width : width;
    const Gradient of_up = gradient(given->of_up, first, dim, given->up.kind, expert);
    const Gradient of_down = gradient(given->of_down, made, width, given->down.kind, expert);
    float *of_up_bias = part(given->of_up_bias, first, expert);
    float *of_down_bias = part(given->of_down_bias, made, expert);
    if (!rows) {
        zero_all(of_up);
        zero_all(of_down);
        zero(of_up_bias, first);
        zero(of_down_bias, made);
        return;
    }
    const int paired = given->paired, kind = paired ? BFLOAT16 : FLOAT32;
    const long start = given->starts[expert], stride = apart(width);
    const long of_stride = given->gated ? 2 * stride : stride, four = paired ? 2 : 1;
    const int64_t *tokens = given->tokens + start;
    const float *weights = given->weights ? given->weights + start : 0;
    float *of_weights = part(given->of_weights, 1, start);
    const Room own = divide(given, rows, 1);
    float *hidden = room + own.hidden, *unrounded = room + own.unrounded;
    void *of_first = room + own.first;
    void *of_value = given->gated ? (void *)number(kind, of_first, width) : 0;
    void *of_hidden = of_value ? of_value : of_first; /* what comes of it is written over it */
    const Matrix grad = of_rows(given->grad, tokens, rows, made, paired, room + own.gathered);
    const Tokens pre_and_value = {of_first, of_stride, kind};
    const int goes_on = sums || of_up.at || of_up_bias;
    if (goes_on || of_weights)
        product(rows, width, made, grad, as_it_is(given->down, expert, paired),
                (Matrix){of_hidden, 0, of_stride, 0}, (Finish){.rounds = paired}, room);
    moefold_differentiate(&(Hidden){
        .kind = given->activation, .kept = given->kept, .made = kind, .rows = rows, .width = width,
        .pre = kept_at(given, given->pre, expert),
        .value = given->gated ? kept_at(given, given->value, expert) : 0,
        .stride = stride, .hidden = hidden, .weights = weights,
        .of_hidden = goes_on || of_weights ? of_hidden : 0, .of_pre = goes_on ? of_first : 0,
        .of_value = goes_on ? of_value : 0,
        .of_weights = of_weights, .grad_stride = of_stride, .of_stride = of_stride});
    if (of_weights && given->down_bias)
        add_along(rows, made, given->grad, tokens, of_expert(given->down_bias, expert, made),
                  of_weights);
    if (of_down_bias)
        sum_rows(rows, made, given->grad, tokens, weights, of_down_bias);
    const Matrix grads = as_summed(grad, paired);
    const Matrix of_pre_and_value = {of_first, 0, of_stride, 0};
    if (of_down.at)
        sum_to(of_down, paired, rows, grads, (Matrix){hidden, 0, stride, 0}, unrounded, room);
    if (of_up_bias)
        sum_rows(rows, first, pre_and_value, 0, 0, of_up_bias);
    if (of_up.at) /* nobody reads the gradient any more, over which x may be written */
        sum_to(of_up, paired, rows, of_pre_and_value,
               as_summed(of_rows(given->x, tokens, rows, dim, paired, room + own.gathered), paired),
               unrounded, room);
    if (sums)
        product(rows, dim, first, (Matrix){of_first, 0, of_stride / four, 0},
                as_it_is(given->up, expert, paired), (Matrix){sums, 0, dim, tokens},
                (Finish){.add = 1}, room);
}

/* Where an index leaves 0 ... size - 1 for the first time; -1 if nowhere. */
EXPORT int64_t moefold_first_beyond(const int64_t *index, int64_t count, int64_t size)
{
    for (int64_t i = 0; i < count; i++)
        if ((uint64_t)index[i] >= (uint64_t)size)
            return i;
    return -1;
}

/* What several threads do together. */
typedef struct {
    const Experts *given;
    const Share *shares;
    int count, backward;
    int next; /* the first share that nobody took yet */
} Work;

/* To be called once by every thread: it does the next share until there is none. */
EXPORT void moefold_work(Work *work)
{
    int mine;
    while ((mine = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count) {
        const Share share = work->shares[mine];
        for (int i = 0; i < share.count; i++) {
            const int expert = share.experts[i];
            if (work->backward)
                backward(work->given, expert, share.sums, share.room);
            else if (work->given->counts[expert])
                forward(work->given, expert, share.sums, share.room);
        }
    }
}
