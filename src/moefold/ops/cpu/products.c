/* Products with a few dozen rows, for x86-64 with AVX2, FMA and F16C. Computed is in float32;
 * matrices of two bytes a number become float32 as they are read.
 *
 * An expert has few rows and large matrices. Libraries arrange both factors of a product anew,
 * which pays if each number is then used for hundreds of rows, and not for 64. Here rows are read
 * where they lie, and a matrix is arranged 16 columns at a time in first-level cache while the next
 * 16 columns are already being fetched. Rows need not be gathered before a product, nor added to
 * their tokens after it: both have an index.
 *
 * A number of a result is one sum in the order of the depth, in steps of DEPTH, or for up to FEW
 * rows eight sums side by side. It depends on its own row and column, and on how many rows there
 * are.
 *
 * The numbers of a row follow each other; rows need not.
 */

#include "experts.h"
#include "lanes.h"
#include "tiles.h"

enum {
    DEPTH = 768,     /* numbers of a column that are arranged at a time */
    ROWS = 96,       /* rows of so many numbers that second-level cache keeps, */
    MOST = 288,      /* and of shorter rows not more than these */
    SHORT = 256,     /* depth of a part of a sum over rows */
    STRIP = 1 << 17, /* numbers of its right factor that second-level cache keeps */
    FEW = 3,         /* rows for which a matrix is not arranged, */
    ABREAST = 4,     /* and columns that are then read side by side */
};

/* Copy `columns` of a row, or add them to it. */
static void write_out(float *out, const float *from, int columns, int add)
{
    for (int i = 0; i < columns; i++)
        out[i] = add ? out[i] + from[i] : from[i];
}

/* Eight rows of eight numbers become eight columns. */
INLINE void transpose(const int kind, const void *from, long stride, float *out)
{
    __m256 row[8], pair[8], four[8];
    for (int i = 0; i < 8; i++)
        row[i] = read_kind(kind, from, i * stride, LANES);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_store_ps(out + i * WIDTH, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_store_ps(out + (i + 4) * WIDTH, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

/* Up to 16 columns of a right factor [depth, columns] as [depth, 16], zeros where there is none. */
INLINE void pack_right(const int kind, int depth, int columns, const void *from, long stride,
                       const int64_t *index, float *out)
{
    for (int k = 0; k < depth; k++, out += WIDTH) {
        const void *row = number(kind, from, place(index, k) * stride);
        for (int i = 0; i < WIDTH; i += LANES)
            _mm256_store_ps(out + i, i < columns ? read_kind(kind, row, i, columns - i)
                                                 : _mm256_setzero_ps());
    }
}

/* The same of a right factor that lies as [columns, depth]. */
INLINE void pack_turned(const int kind, int depth, int columns, const void *from, long stride,
                        float *out)
{
    int k = 0;
    if (columns == WIDTH)
        for (; k + 8 <= depth; k += 8) {
            transpose(kind, number(kind, from, k), stride, out + k * WIDTH);
            transpose(kind, number(kind, from, k + 8 * stride), stride, out + k * WIDTH + 8);
        }
    for (; k < depth; k++)
        for (int i = 0; i < WIDTH; i++)
            out[k * WIDTH + i] =
                i < columns ? _mm256_cvtss_f32(read_kind(kind, from, i * stride + k, 1)) : 0;
}

#define PACK(kind) \
    if (right.turned) \
        pack_turned(kind, depth, columns, from, right.stride, out); \
    else \
        pack_right(kind, depth, columns, from, right.stride, 0, out)

/* Either, of a part of a factor that begins at `from`. */
static void pack(int depth, int columns, Factor right, const void *from, float *out)
{
    switch (right.kind) {
    case FLOAT32: PACK(FLOAT32); break;
    case BFLOAT16: PACK(BFLOAT16); break;
    default: PACK(FLOAT16);
    }
}

/* Columns of a left factor that lies as [depth, columns], six by six as [depth, 6]. */
static void pack_left(int depth, int columns, const float *from, long stride,
                      const int64_t *index, float *out)
{
    for (int i = 0; i < columns; i += HEIGHT, from += HEIGHT)
        for (int k = 0; k < depth; k++, out += HEIGHT) {
            const float *row = from + place(index, k) * stride;
            if (i + 8 <= columns) /* what comes next overwrites the last two */
                _mm256_storeu_ps(out, _mm256_loadu_ps(row));
            else
                for (int j = 0; j < HEIGHT; j++)
                    out[j] = i + j < columns ? row[j] : 0;
        }
}

/* The next 16 columns of a right factor: two in each of eight calls, or an eighth of the depth. */
static Ahead next_columns(Factor right, const void *here, int depth, int call)
{
    const long size = right.kind == FLOAT32 ? 4 : 2, stride = size * right.stride;
    if (right.turned) {
        const char *column = (const char *)here + (WIDTH + 2 * call) * stride;
        return (Ahead){column, column + stride, 16 * size};
    }
    const char *row = (const char *)here + WIDTH * size + (long)call * (depth / 8) * stride;
    return (Ahead){row, row + stride, 2 * stride};
}

/* `product` of a few rows with columns whose numbers follow each other: a matrix is read once, as
 * fast as memory gives it. A number is the sum of eight sums, each of every eighth step. */
INLINE void few_rows(const int kind, const int rows, int columns, int depth, Matrix left,
                     Factor right, Matrix out, Finish finish)
{
    const float *lefts[FEW];
    for (int i = 0; i < rows; i++)
        lefts[i] = left.at + place(left.index, i) * left.stride;
    for (int column = 0; column < columns; column += ABREAST) {
        const int wide = least(ABREAST, columns - column);
        const void *at[ABREAST];
        for (int j = 0; j < ABREAST; j++) /* the last one again where there are fewer */
            at[j] = number(kind, right.at, (column + least(j, wide - 1)) * right.stride);
        __m256 sums[FEW][ABREAST];
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < ABREAST; j++)
                sums[i][j] = _mm256_setzero_ps();
        for (int k = 0; k < depth; k += LANES) {
            __m256 factors[FEW];
            for (int i = 0; i < rows; i++)
                factors[i] = read(lefts[i] + k, depth - k);
            for (int j = 0; j < ABREAST; j++) {
                __builtin_prefetch(number(kind, at[j], ABREAST * right.stride + k), 0, 2);
                const __m256 numbers = read_kind(kind, at[j], k, depth - k);
                for (int i = 0; i < rows; i++)
                    MULTIPLY_ADD(sums[i][j], factors[i], numbers);
            }
        }
        for (int i = 0; i < rows; i++) {
            float *to = out.at + place(out.index, i) * out.stride + column;
            for (int j = 0; j < wide; j++) {
                float made = total(sums[i][j]);
                made = finish.bias ? made + finish.bias[column + j] : made;
                made = finish.scale ? made * finish.scale[i] : made;
                to[j] = finish.add ? to[j] + made : made;
            }
        }
    }
}

#define FEW_ROWS(kind) \
    switch (rows) { \
    case 1: few_rows(kind, 1, columns, depth, left, right, out, finish); return; \
    case 2: few_rows(kind, 2, columns, depth, left, right, out, finish); return; \
    case 3: few_rows(kind, 3, columns, depth, left, right, out, finish); return; \
    }

/* Needs DEPTH * WIDTH floats of the room. */
void product(int rows, int columns, int depth, Matrix left, Factor right, Matrix out, Finish finish,
             float *room)
{
    if (right.turned && rows <= FEW)
        switch (right.kind) {
        case FLOAT32: FEW_ROWS(FLOAT32) break;
        case BFLOAT16: FEW_ROWS(BFLOAT16) break;
        default: FEW_ROWS(FLOAT16)
        }
    /* As many rows at a time as cache keeps, in parts of like size. */
    const int limit = least(MOST, ROWS * DEPTH / least(DEPTH, depth) / HEIGHT * HEIGHT);
    const int parts = (rows + limit - 1) / limit;
    const int each = ((rows + parts - 1) / parts + HEIGHT - 1) / HEIGHT * HEIGHT;
    const float *lefts[MOST];
    float *outs[MOST], edge[HEIGHT * WIDTH], *edges[HEIGHT], edge_bias[WIDTH] = {0};
    for (int i = 0; i < HEIGHT; i++)
        edges[i] = edge + i * WIDTH;
    for (int row = 0; row < rows; row += each) {
        const int some = least(each, rows - row);
        for (int i = 0; i < some; i++) {
            lefts[i] = left.at + place(left.index, row + i) * left.stride;
            outs[i] = out.at + place(out.index, row + i) * out.stride;
        }
        for (int from = 0; from < depth; from += DEPTH) {
            const int steps = least(DEPTH, depth - from), adds = finish.add || from;
            for (int column = 0; column < columns; column += WIDTH) {
                const int wide = least(WIDTH, columns - column);
                const void *here = number(right.kind, right.at,
                                          right.turned ? column * right.stride + from
                                                       : from * right.stride + column);
                pack(steps, wide, right, here, room);
                const float *bias = finish.bias && !from ? finish.bias + column : 0;
                if (bias && wide < WIDTH) {
                    write_out(edge_bias, bias, wide, 0);
                    bias = edge_bias;
                }
                const int more = column + 2 * WIDTH <= columns;
                for (int i = 0, call = 0; i < some; i += HEIGHT, call++) {
                    const int high = least(HEIGHT, some - i);
                    const float *scale = finish.scale ? finish.scale + row + i : 0;
                    const Ahead ahead = more && call < 8
                        ? next_columns(right, here, steps, call)
                        : (Ahead){(const char *)lefts[i], (const char *)lefts[i], 0};
                    if (wide == WIDTH) {
                        TILES[high](steps, lefts + i, from, room, outs + i, column,
                                    (Finish){bias, scale, adds}, ahead);
                        continue;
                    }
                    TILES[high](steps, lefts + i, from, room, edges, 0, (Finish){bias, scale, 0},
                                ahead);
                    for (int j = 0; j < high; j++)
                        write_out(outs[i + j] + column, edges[j], wide, adds);
                }
            }
        }
    }
}

/* Needs STRIP + ROWS * SHORT floats of the room. */
void sum(int lefts, int rights, int depth, Matrix left, Matrix right, Matrix out, float *room)
{
    float *outs[HEIGHT], edge[HEIGHT * WIDTH], *edges[HEIGHT], *packed = room + STRIP;
    for (int i = 0; i < HEIGHT; i++)
        edges[i] = edge + i * WIDTH;
    for (int from = 0; from < depth; from += SHORT) {
        const int steps = least(SHORT, depth - from), strip = STRIP / steps / WIDTH * WIDTH;
        /* Of a factor with an index the rows move, of one without the start. */
        const int64_t *left_index = left.index ? left.index + from : 0;
        const int64_t *right_index = right.index ? right.index + from : 0;
        const float *left_at = left.at + (left.index ? 0 : from * left.stride);
        const float *right_at = right.at + (right.index ? 0 : from * right.stride);
        for (int column = 0; column < rights; column += strip) {
            const int wide = least(strip, rights - column), tiles = wide / WIDTH;
            for (int i = 0; i < wide; i += WIDTH)
                pack_right(FLOAT32, steps, least(WIDTH, wide - i), right_at + column + i,
                           right.stride, right_index, room + (long)i * steps);
            const float *last = room + (long)tiles * WIDTH * steps;
            for (int i = 0; i < lefts; i += HEIGHT) {
                if (i % ROWS == 0)
                    pack_left(steps, least(ROWS, lefts - i), left_at + i, left.stride, left_index,
                              packed);
                const int high = least(HEIGHT, lefts - i);
                const float *own = packed + (long)(i % ROWS) * steps;
                for (int j = 0; j < high; j++)
                    outs[j] = out.at + (i + j) * out.stride;
                ROW_OF_TILES[high](steps, own, room, outs, column, tiles, from > 0);
                if (wide % WIDTH) {
                    ROW_OF_TILES[high](steps, own, last, edges, 0, 1, 0);
                    for (int j = 0; j < high; j++)
                        write_out(outs[j] + column + tiles * WIDTH, edges[j], wide % WIDTH,
                                  from > 0);
                }
            }
        }
    }
}

static void to_next(Matrix *matrix, int rows)
{
    matrix->at += matrix->next;
    if (matrix->index)
        matrix->index += rows;
}

EXPORT long moefold_room(void) { return STRIP + ROWS * SHORT; }

/* `product` for each of a stack of experts. A matrix is given as: start, stride between experts,
 * stride between rows, index of its rows. */
EXPORT void moefold_products(int experts, int rows, int columns, int depth,
                      float *left_at, long left_next, long left_stride, const int64_t *left_index,
                      const void *right_at, long right_next, long right_stride, int turned,
                      int kind,
                      float *out_at, long out_next, long out_stride, const int64_t *out_index,
                      const float *bias, long bias_next, const float *scale, int add, float *room)
{
    Matrix left = {left_at, left_next, left_stride, left_index};
    Factor right = {right_at, right_stride, turned, kind};
    Matrix out = {out_at, out_next, out_stride, out_index};
    for (; experts; experts--) {
        product(rows, columns, depth, left, right, out, (Finish){bias, scale, add}, room);
        to_next(&left, rows);
        right.at = number(kind, right.at, right_next);
        to_next(&out, rows);
        bias = bias ? bias + bias_next : 0;
        scale = scale ? scale + rows : 0;
    }
}

/* `sum` for each of a stack of experts. */
EXPORT void moefold_sums(int experts, int lefts, int rights, int depth,
                  float *left_at, long left_next, long left_stride, const int64_t *left_index,
                  float *right_at, long right_next, long right_stride, const int64_t *right_index,
                  float *out_at, long out_next, long out_stride, float *room)
{
    Matrix left = {left_at, left_next, left_stride, left_index};
    Matrix right = {right_at, right_next, right_stride, right_index};
    Matrix out = {out_at, out_next, out_stride, 0};
    for (; experts; experts--) {
        sum(lefts, rights, depth, left, right, out, room);
        to_next(&left, depth);
        to_next(&right, depth);
        to_next(&out, 0);
    }
}
