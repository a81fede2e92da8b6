/* The best experts of every token with their weights, and the list of rows sorted by expert; slow
 * twins: `top`, `weigh` and `list_reference` of `moefold.ops`.
 *
 * Several threads take blocks of tokens as they come. What is written for a token, and where, does
 * not depend on who took it.
 */

#include "lanes.h"
#include <math.h>
#include <string.h>

/* Eight marks, as one bit each: a mark is a byte that is not 0. */
INLINE uint64_t eight_marks(const uint8_t *at, int count)
{
    uint64_t marks = 0;
    if (count >= 8)
        memcpy(&marks, at, 8);
    else
        for (int i = 0; i < count; i++)
            marks |= (uint64_t)at[i] << 8 * i;
    const uint64_t low = 0x7f7f7f7f7f7f7f7f; /* adding it to the low bits of a byte sets the high */
    return (((marks & low) + low) | marks) >> 7 & 0x0101010101010101;
}

/* For each marked expert of a token, ascending. */
#define EACH_MARKED(expert, marks, experts) \
    for (int first = 0; first < (experts); first += 8) \
        for (uint64_t left = eight_marks((marks) + first, (experts) - first), expert; \
             left && (expert = first + __builtin_ctzll(left) / 8, 1); left &= left - 1)

/* The next block of tokens that nobody took yet: where it ends, or 0 if there is none. */
static int64_t take(int64_t *next, int64_t block, int64_t tokens, int64_t *start)
{
    *start = __atomic_fetch_add(next, block, __ATOMIC_RELAXED);
    if (*start >= tokens)
        return 0;
    return *start + block < tokens ? *start + block : tokens;
}

/* All arrays are [tokens, experts]. */
typedef struct {
    int64_t tokens, block; /* how many tokens a thread takes at once */
    int experts, k, normalize;
    float scale;
    const float *contest, *scores; /* what decides, and what weights are made of */
    const uint8_t *real;           /* [tokens]: those that choose; 0 for all */
    uint8_t *chosen;
    float *weights;
    const float *of_weights; /* gradients */
    float *of_scores;        /* 0 forward */
    int64_t next;
} Choice;

/* The highest of a token's numbers, and then the first that is as high; -1 if there is none. Those
 * that do not take part are not a number. */
INLINE int highest(const float *numbers, int count)
{
    __m256 best = _mm256_set1_ps(-INFINITY);
    for (int i = 0; i < count; i += LANES) /* of a number and of none, max gives the second */
        best = _mm256_max_ps(_mm256_loadu_ps(numbers + i), best);
    best = _mm256_max_ps(best, _mm256_permute2f128_ps(best, best, 1));
    best = _mm256_max_ps(best, _mm256_shuffle_ps(best, best, 0x4e));
    best = _mm256_max_ps(best, _mm256_shuffle_ps(best, best, 0xb1));
    for (int i = 0; i < count; i += LANES) {
        const __m256 same = _mm256_cmp_ps(_mm256_loadu_ps(numbers + i), best, _CMP_EQ_OQ);
        const int which = _mm256_movemask_ps(same);
        if (which)
            return i + __builtin_ctz(which);
    }
    return -1;
}

static void choose(const Choice *given, int64_t token)
{
    const int experts = given->experts;
    const int64_t start = token * experts;
    const float *scores = given->scores + start;
    uint8_t *chosen = given->chosen + start;
    float *weights = given->weights + start;
    memset(chosen, 0, experts);
    memset(weights, 0, experts * sizeof *weights);
    if (given->real && !given->real[token])
        return;
    float left[(experts + LANES - 1) / LANES * LANES];
    memcpy(left, given->contest + start, experts * sizeof *left);
    for (int i = experts; i % LANES; i++)
        left[i] = NAN;
    int picked[given->k], count = 0;
    float total = 0;
    for (int best; count < given->k && (best = highest(left, experts)) >= 0; count++) {
        picked[count] = best;
        total += scores[best];
        left[best] = NAN;
    }
    const float divisor = given->normalize && total > 0 ? total : 1;
    for (int i = 0; i < count; i++) {
        chosen[picked[i]] = 1;
        weights[picked[i]] = scores[picked[i]] / divisor * given->scale;
    }
}

/* weight_i = scale score_i / total: its derivative by the score of a chosen one is
 * (scale - weight_i) / total for its own, and -weight_i / total for another. */
static void choose_backward(const Choice *given, int64_t token)
{
    const int experts = given->experts;
    const int64_t start = token * experts;
    const float *scores = given->scores + start, *of_weights = given->of_weights + start;
    const uint8_t *chosen = given->chosen + start;
    float *of_scores = given->of_scores + start, total = 0, drawn = 0;
    memset(of_scores, 0, experts * sizeof *of_scores);
    if (given->normalize)
        EACH_MARKED(i, chosen, experts) {
            total += scores[i];
            drawn += of_weights[i] * scores[i];
        }
    const float divisor = total > 0 ? total : 1;
    const float shared = total > 0 ? drawn / total : 0;
    EACH_MARKED(i, chosen, experts)
        of_scores[i] = (of_weights[i] - shared) / divisor * given->scale;
}

/* To be called once by every thread. */
EXPORT void moefold_choose(Choice *given)
{
    int64_t token, end;
    while ((end = take(&given->next, given->block, given->tokens, &token)))
        for (; token < end; token++)
            if (given->of_scores)
                choose_backward(given, token);
            else
                choose(given, token);
}

typedef struct {
    int64_t tokens, block;
    int experts;
    const uint8_t *chosen; /* [tokens, experts] */
    const float *weights;  /* likewise */
    int64_t *places;       /* [blocks, experts]: how many are chosen, then where the next goes */
    int64_t *token_of_row; /* 0 while they are counted */
    float *weight_of_row;
    int64_t next;
} List;

/* To be called once by every thread: counts what is chosen, or puts it in its place. */
EXPORT void moefold_list(List *given)
{
    const int experts = given->experts;
    int64_t token, end;
    while ((end = take(&given->next, given->block, given->tokens, &token))) {
        int64_t *places = given->places + token / given->block * experts;
        if (!given->token_of_row)
            memset(places, 0, experts * sizeof *places);
        for (; token < end; token++) {
            const uint8_t *chosen = given->chosen + token * experts;
            if (!given->token_of_row) {
                EACH_MARKED(i, chosen, experts) places[i]++;
                continue;
            }
            EACH_MARKED(i, chosen, experts) {
                const int64_t row = places[i]++;
                given->token_of_row[row] = token;
                given->weight_of_row[row] = given->weights[token * experts + i];
            }
        }
    }
}

/* Counts become places: by expert, and within one by block. Also how many rows each expert has, and
 * all have. */
EXPORT int64_t moefold_places(const List *given, int64_t *rows_per_expert)
{
    const int experts = given->experts;
    const int64_t blocks = (given->tokens + given->block - 1) / given->block;
    int64_t row = 0;
    for (int i = 0; i < experts; i++) {
        const int64_t start = row;
        for (int64_t block = 0; block < blocks; block++) {
            int64_t *place = given->places + block * experts + i, count = *place;
            *place = row;
            row += count;
        }
        rows_per_expert[i] = row - start;
    }
    return row;
}

/* of_pair[token, expert] = of_row[row] of its row; of_pair holds zeros. */
EXPORT void moefold_unlist(int experts, const int64_t *rows_per_expert, const int64_t *token_of_row,
                           const float *of_row, float *of_pair)
{
    for (int i = 0; i < experts; i++)
        for (int64_t left = rows_per_expert[i]; left; left--)
            of_pair[*token_of_row++ * experts + i] = *of_row++;
}
