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
 * for. `pre` and `value` hold `[rows, width]` of the kind `kept`; biases and gradients lie without
 * gaps, `of_up` and `of_down` of the stacks' kind. `dim` numbers in a token, `made` in a result. */
typedef struct {
    int dim, width, made, gated, activation, kept;
    const int64_t *counts, *starts; /* of the rows of each expert */
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
    float *room; /* moefold_room_for(...) floats, aligned to 32 bytes */
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
    long gathered;  /* [rows, made] of grad, then [rows, dim] of x, if not float32 as they lie */
    long unrounded; /* a slab of a gradient, if that is not float32 */
    long all;
} Room;

static Room divide(const Experts *given, long rows, int backward)
{
    const int first = (given->gated ? 2 : 1) * given->width;
    const int gathers_x = given->x.kind != FLOAT32;
    const int gathers_grad = backward && given->grad.kind != FLOAT32;
    const int rounds = backward && given->up.kind != FLOAT32;
    const long of_up = (long)slab(first, given->dim) * given->dim;
    const long of_down = (long)slab(given->made, given->width) * given->width;
    Room room = {.hidden = moefold_room()};
    room.first = room.hidden + rows * apart(given->width);
    room.gathered = room.first + rows * apart(given->width) * (given->gated ? 2 : 1);
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
static Factor transposed(Stack stack, int expert, long first)
{
    const int turned = stack.column == 1;
    const void *at = number(stack.kind, stack.at, expert * stack.next + first * stack.row);
    return (Factor){at, turned ? stack.row : stack.column, turned, stack.kind};
}

static Factor as_it_is(Stack stack, int expert)
{
    const int turned = stack.column != 1;
    const void *at = number(stack.kind, stack.at, expert * stack.next);
    return (Factor){at, turned ? stack.column : stack.row, turned, stack.kind};
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

/* What belongs to the tokens of rows as float32: where it lies, or gathered into memory for it. */
static Matrix of_rows(Tokens from, const int64_t *tokens, int rows, int width, float *into)
{
    if (from.kind == FLOAT32)
        return (Matrix){(float *)from.at, 0, from.stride, tokens};
    const long stride = apart(width);
    for (int row = 0; row < rows; row++) {
        const void *at = number(from.kind, from.at, tokens[row] * from.stride);
        widen_all(from.kind, at, width, into + row * stride);
    }
    return (Matrix){into, 0, stride, 0};
}

/* One half of the first product: where the backward pass looks for it, if it is kept in float32,
 * else in memory of our own. */
static float *half_at(const Experts *given, void *kept, long start, float *own)
{
    return kept && given->kept == FLOAT32 ? (float *)kept + start * given->width : own;
}

/* Keep it, if it is kept in fewer bytes. */
static void keep(const Experts *given, const float *half, long start, int rows, void *kept)
{
    const long width = given->width;
    if (kept && given->kept != FLOAT32)
        round_all(given->kept, half, rows * width, (void *)number(given->kept, kept, start * width));
}

static void forward(const Experts *given, int expert, float *sums, float *room)
{
    const int rows = (int)given->counts[expert], width = given->width;
    const long start = given->starts[expert], stride = apart(width);
    const int64_t *tokens = given->tokens + start;
    const Room own = divide(given, rows, 0);
    float *hidden = room + own.hidden, *first = room + own.first;
    float *pre = half_at(given, given->pre, start, first);
    float *value = half_at(given, given->value, start, first + rows * stride);
    const Matrix x = of_rows(given->x, tokens, rows, given->dim, room + own.gathered);
    const float *bias = of_expert(given->up_bias, expert, given->gated ? 2 * width : width);
    product(rows, width, given->dim, x, transposed(given->up, expert, 0),
             (Matrix){pre, 0, width, 0}, (Finish){bias, 0, 0}, room);
    keep(given, pre, start, rows, given->pre);
    if (given->gated) {
        product(rows, width, given->dim, x, transposed(given->up, expert, width),
                 (Matrix){value, 0, width, 0}, (Finish){bias ? bias + width : 0, 0, 0}, room);
        keep(given, value, start, rows, given->value);
    }
    moefold_activate(&(Hidden){.kind = given->activation, .rows = rows, .width = width,
                               .pre = pre, .value = given->gated ? value : 0, .stride = stride,
                               .hidden = hidden});
    product(rows, given->made, width, (Matrix){hidden, 0, stride, 0},
             transposed(given->down, expert, 0), (Matrix){sums, 0, given->made, tokens},
             (Finish){of_expert(given->down_bias, expert, given->made),
                      given->weights ? given->weights + start : 0, 1}, room);
}

/* Sums over rows, each times its weight. */
static void sum_rows(int rows, int columns, Matrix from, const float *weights, float *out)
{
    for (int i = 0; i < columns; i++)
        out[i] = 0;
    for (int row = 0; row < rows; row++) {
        const float *at = from.at + place(from.index, row) * from.stride;
        const float weight = weights ? weights[row] : 1;
        for (int i = 0; i < columns; i++)
            out[i] += weight * at[i];
    }
}

/* Of the weights of the rows, what comes by way of the bias of the second product. */
static void add_along(int rows, int columns, Matrix grad, const float *bias, float *of_weights)
{
    for (int row = 0; row < rows; row++) {
        const float *at = grad.at + place(grad.index, row) * grad.stride;
        double sum = 0;
        for (int i = 0; i < columns; i++)
            sum += (double)at[i] * bias[i];
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
        memset(out.at, 0, (out.kind == FLOAT32 ? 4 : 2) * (long)out.lefts * out.rights);
}

/* `sum`; if the gradient is not float32, slab by slab, each rounded at its end. */
static void sum_to(Gradient out, int depth, Matrix left, Matrix right, float *unrounded,
                   float *room)
{
    const int rights = out.rights, rounds = out.kind != FLOAT32;
    const int each = rounds ? slab(out.lefts, rights) : out.lefts;
    for (int first = 0; first < out.lefts; first += each, left.at += each) {
        const int some = least(each, out.lefts - first);
        void *at = (void *)number(out.kind, out.at, (long)first * rights);
        float *made = rounds ? unrounded : at;
        sum(some, rights, depth, left, right, (Matrix){made, 0, rights, 0}, room);
        if (rounds)
            round_all(out.kind, made, (long)some * rights, at);
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
    const long start = given->starts[expert], stride = apart(width);
    const long of_stride = given->gated ? 2 * stride : stride;
    const int64_t *tokens = given->tokens + start;
    const float *weights = given->weights ? given->weights + start : 0;
    float *of_weights = part(given->of_weights, 1, start);
    const Room own = divide(given, rows, 1);
    float *hidden = room + own.hidden, *of_first = room + own.first;
    float *unrounded = room + own.unrounded;
    /* What is computed from it is written over it. */
    float *of_hidden = of_first + (given->gated ? width : 0);
    const Matrix grad = of_rows(given->grad, tokens, rows, made, room + own.gathered);
    const Matrix of_pre_and_value = {of_first, 0, of_stride, 0};
    const int goes_on = sums || of_up.at || of_up_bias;
    if (goes_on || of_weights)
        product(rows, width, made, grad, as_it_is(given->down, expert),
                 (Matrix){of_hidden, 0, of_stride, 0}, (Finish){0, 0, 0}, room);
    moefold_differentiate(&(Hidden){
        .kind = given->activation, .kept = given->kept, .rows = rows, .width = width,
        .pre = number(given->kept, given->pre, start * width),
        .value = given->gated ? number(given->kept, given->value, start * width) : 0,
        .stride = stride, .hidden = hidden, .weights = weights,
        .of_hidden = goes_on || of_weights ? of_hidden : 0, .of_pre = goes_on ? of_first : 0,
        .of_value = goes_on && given->gated ? of_hidden : 0,
        .of_weights = of_weights, .grad_stride = of_stride, .of_stride = of_stride});
    if (of_weights && given->down_bias)
        add_along(rows, made, grad, of_expert(given->down_bias, expert, made), of_weights);
    if (of_down_bias)
        sum_rows(rows, made, grad, weights, of_down_bias);
    if (of_down.at)
        sum_to(of_down, rows, grad, (Matrix){hidden, 0, stride, 0}, unrounded, room);
    if (of_up_bias)
        sum_rows(rows, first, of_pre_and_value, 0, of_up_bias);
    if (of_up.at) /* nobody reads the gradient any more, over which x may be written */
        sum_to(of_up, rows, of_pre_and_value,
               of_rows(given->x, tokens, rows, dim, room + own.gathered), unrounded, room);
    if (sums)
        product(rows, dim, first, of_pre_and_value, as_it_is(given->up, expert),
                 (Matrix){sums, 0, dim, tokens}, (Finish){0, 0, 1}, room);
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
