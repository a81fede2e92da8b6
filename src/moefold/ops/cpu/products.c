/* Products with a few dozen rows, for x86-64 with AVX2, FMA and F16C, and faster with AVX-512.
 * Computed is in float32; matrices of two bytes a number become float32 as they are read. Where
 * rows are bfloat16 and the processor can do that, they are multiplied pair by pair with matrices
 * of bfloat16, or of float32, which are rounded as they are read.
 *
 * An expert has few rows and large matrices. Libraries arrange both factors of a product anew,
 * which pays if each number is then used for hundreds of rows, and not for 64. Here rows are read
 * where they lie, and a matrix is arranged WIDTH columns at a time in cache while the next ones are
 * already being fetched. Rows need not be gathered before a product, nor added to their tokens
 * after it: both have an index.
 *
 * A number of a result is one sum in the order of the depth, in parts of it, or for up to FEW
 * rows as many sums side by side as a vector has numbers. It depends on its own row and column, and
 * on how many rows there are.
 *
 * The numbers of a row follow each other; rows need not.
 */

#include "arrange.h"
#include "dots.h"

enum {
    DEPTH = 768,     /* steps of a column that are arranged at a time */
    ROWS = 96,       /* rows of so many steps that second-level cache keeps, */
    MOST = 288,      /* and of shorter rows not more than these */
    STRIP = 1 << 17, /* steps of the right factor of a sum that this cache keeps */
    SHORT = HAS_PAIRS ? MOST_ROUNDED / 2 : 256, /* steps of a part of a sum */
};

/* Needs DEPTH * WIDTH floats of the room, or half of MOST_DEPTH. */
void product(int rows, int columns, int depth, Matrix left, Factor right, Matrix out, Finish finish,
             float *room)
{
    const int each_step = right.paired && !right.turned ? 2 : 1; /* rows of the right factor */
    if (right.paired) {
        depth /= 2;
        if (right.turned) /* what is arranged are four bytes, as if they were one number */
            right = (Factor){right.at, right.stride / 2, 1,
                             right.kind == FLOAT32 ? ROUNDED : FLOAT32, 1};
    }
    if (right.turned && rows <= FEW) {
        few_rows(rows, columns, depth, left, right, out, finish);
        return;
    }
    /* As many rows at a time as cache keeps, in parts of like size. */
    const int deep = finish.rounds ? depth : least(DEPTH, depth); /* what is rounded is whole */
    const int limit = most(least(MOST, ROWS * DEPTH / deep / HEIGHT * HEIGHT), HEIGHT);
    const int parts = (rows + limit - 1) / limit;
    const int each = ((rows + parts - 1) / parts + HEIGHT - 1) / HEIGHT * HEIGHT;
    const float *lefts[MOST];
    float edge[HEIGHT * WIDTH], edge_bias[WIDTH] = {0};
    void *outs[MOST], *edges[HEIGHT];
    for (int i = 0; i < HEIGHT; i++)
        edges[i] = edge + i * WIDTH;
    for (int row = 0; row < rows; row += each) {
        const int some = least(each, rows - row);
        for (int i = 0; i < some; i++) {
            lefts[i] = left.at + place(left.index, row + i) * left.stride;
            outs[i] = at_number(finish.rounds, out.at, place(out.index, row + i) * out.stride);
        }
        for (int from = 0; from < depth; from += deep) {
            const int steps = least(deep, depth - from), adds = finish.add || from;
            for (int column = 0; column < columns; column += WIDTH) {
                const int wide = least(WIDTH, columns - column);
                const void *here = number(right.kind, right.at,
                                          right.turned ? column * right.stride + from
                                                       : each_step * from * right.stride + column);
                pack(steps, wide, right, here, room);
                const float *bias = finish.bias && !from ? finish.bias + column : 0;
                if (bias && wide < WIDTH) {
                    write_out(0, edge_bias, 0, bias, wide, 0);
                    bias = edge_bias;
                }
                const int more = column + 2 * WIDTH <= columns;
                for (int i = 0, call = 0; i < some; i += HEIGHT, call++) {
                    const int high = least(HEIGHT, some - i);
                    const float *scale = finish.scale ? finish.scale + row + i : 0;
                    const Ahead ahead = more && call < CALLS
                        ? next_columns(right, here, each_step * steps, call)
                        : (Ahead){(const char *)lefts[i], (const char *)lefts[i], 0, 0, 0};
                    if (wide == WIDTH) {
                        TILES[high](right.paired, steps, lefts + i, from, room, outs + i, column,
                                    (Finish){bias, scale, adds, finish.rounds}, ahead);
                        continue;
                    }
                    TILES[high](right.paired, steps, lefts + i, from, room, edges, 0,
                                (Finish){bias, scale, 0, 0}, ahead);
                    for (int j = 0; j < high; j++)
                        write_out(finish.rounds, outs[i + j], column, edges[j], wide, adds);
                }
            }
        }
    }
}

/* A matrix from a row on: if it has an index, this moves, else its start. */
static Matrix from_row(Matrix matrix, int paired, long row)
{
    if (matrix.index)
        matrix.index += row;
    else
        matrix.at = at_number(paired, matrix.at, row * matrix.stride);
    return matrix;
}

/* Needs STRIP + ROWS * SHORT floats of the room. */
void sum(int paired, int rounds, int lefts, int rights, int depth, Matrix left, Matrix right,
         Matrix out, float *room)
{
    const int each_step = paired ? 2 : 1; /* rows */
    float edge[HEIGHT * WIDTH], *packed = room + STRIP;
    void *outs[HEIGHT], *edges[HEIGHT];
    for (int i = 0; i < HEIGHT; i++)
        edges[i] = edge + i * WIDTH;
    for (int from = 0; from < depth; from += SHORT * each_step) {
        const int rows = least(SHORT * each_step, depth - from);
        const int steps = (rows + each_step - 1) / each_step, strip = STRIP / steps / WIDTH * WIDTH;
        const int add = from > 0;
        const Matrix left_here = from_row(left, paired, from);
        const Matrix right_here = from_row(right, paired, from);
        for (int column = 0; column < rights; column += strip) {
            const int wide = least(strip, rights - column), tiles = wide / WIDTH;
            for (int i = 0; i < wide; i += WIDTH)
                arrange_right(paired, rows, least(WIDTH, wide - i), right_here, column + i,
                              room + (long)i * steps);
            const float *last = room + (long)tiles * WIDTH * steps;
            for (int i = 0; i < lefts; i += HEIGHT) {
                if (i % ROWS == 0)
                    arrange_left(paired, rows, least(ROWS, lefts - i), left_here, i, packed);
                const int high = least(HEIGHT, lefts - i);
                const float *own = packed + (long)(i % ROWS) * steps;
                for (int j = 0; j < high; j++)
                    outs[j] = at_number(rounds, out.at, (i + j) * out.stride);
                ROWS_OF_TILES[high](paired, rounds, steps, own, room, outs, column, tiles, add);
                if (wide % WIDTH) {
                    ROWS_OF_TILES[high](paired, 0, steps, own, last, edges, 0, 1, 0);
                    for (int j = 0; j < high; j++)
                        write_out(rounds, outs[j], column + tiles * WIDTH, edges[j], wide % WIDTH,
                                  add);
                }
            }
        }
    }
}

static void to_next(int is_low, Matrix *matrix, int rows)
{
    matrix->at = at_number(is_low, matrix->at, matrix->next);
    if (matrix->index)
        matrix->index += rows;
}

EXPORT long moefold_room(void) { return STRIP + ROWS * SHORT; }

/* `product` for each of a stack of experts. A matrix is given as: start, stride between experts,
 * stride between rows, index of its rows; of the left one strides count four bytes. */
EXPORT void moefold_products(int experts, int rows, int columns, int depth, int paired,
                      float *left_at, long left_next, long left_stride, const int64_t *left_index,
                      const void *right_at, long right_next, long right_stride, int turned,
                      int kind,
                      float *out_at, long out_next, long out_stride, const int64_t *out_index,
                      const float *bias, long bias_next, const float *scale, int add, int rounds,
                      float *room)
{
    Matrix left = {left_at, left_next, left_stride, left_index};
    Factor right = {right_at, right_stride, turned, kind, paired};
    Matrix out = {out_at, out_next, out_stride, out_index};
    for (; experts; experts--) {
        product(rows, columns, depth, left, right, out, (Finish){bias, scale, add, rounds}, room);
        to_next(0, &left, rows); /* in units of four bytes */
        right.at = number(kind, right.at, right_next);
        to_next(rounds, &out, rows);
        bias = bias ? bias + bias_next : 0;
        scale = scale ? scale + rows : 0;
    }
}

/* `sum` for each of a stack of experts. */
EXPORT void moefold_sums(int experts, int lefts, int rights, int depth, int paired, int rounds,
                  float *left_at, long left_next, long left_stride, const int64_t *left_index,
                  float *right_at, long right_next, long right_stride, const int64_t *right_index,
                  float *out_at, long out_next, long out_stride, float *room)
{
    Matrix left = {left_at, left_next, left_stride, left_index};
    Matrix right = {right_at, right_next, right_stride, right_index};
    Matrix out = {out_at, out_next, out_stride, 0};
    for (; experts; experts--) {
        sum(paired, rounds, lefts, rights, depth, left, right, out, room);
        to_next(paired, &left, depth);
        to_next(paired, &right, depth);
        to_next(rounds, &out, 0);
    }
}

/* Whether pairs of bfloat16 numbers are multiplied here. */
EXPORT int moefold_has_pairs(void) { return HAS_PAIRS; }
