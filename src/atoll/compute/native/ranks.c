/* The mean of some ranks of each column, in plan/aggregate/robust.py: the same bits. WIDE: float64 instead of float32. */

#include <stdint.h>
#include <string.h>

#ifdef WIDE
typedef double real;
typedef int64_t integer;
#else
typedef float real;
typedef int32_t integer;
#endif
#define WIDTH 64 /* columns that are sorted together: n rows of 64 numbers stay in the caches */

typedef real numbers __attribute__((vector_size(32)));
typedef integer bits __attribute__((vector_size(32)));

/* out[j] = the mean of the values of rank first, …, end − 1 in column j of x `[n, d]`, whose rows are `stride` numbers
   apart. `pairs` are the comparators of a sorting network, `scratch` has room for n · 64 numbers. Returns whether a
   number is NaN, which has no rank; then `out` is not complete. */
int64_t mean_of_ranks(const real *x, int64_t n, int64_t d, int64_t stride, const int32_t *pairs, int64_t pair_count,
                      int64_t first, int64_t end, real *scratch, double *out) {
    for (int64_t start = 0; start < d; start += WIDTH) {
        const int64_t width = start + WIDTH < d ? WIDTH : d - start;
        int unordered = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < WIDTH; j++) {
                const real value = j < width ? x[i * stride + start + j] : 0;
                unordered |= value != value;
                scratch[i * WIDTH + j] = value;
            }
        if (unordered)
            return 1;
        for (int64_t p = 0; p < pair_count; p++) {
            real *at = scratch + pairs[2 * p] * WIDTH, *under = scratch + pairs[2 * p + 1] * WIDTH;
            for (int64_t j = 0; j < WIDTH; j += sizeof(numbers) / sizeof(real)) {
                numbers a, b;
                memcpy(&a, at + j, sizeof a);
                memcpy(&b, under + j, sizeof b);
                const bits smaller = a < b, other = ((bits)a ^ (bits)b) & smaller;
                const numbers high = (numbers)((bits)a ^ other), low = (numbers)((bits)b ^ other);
                memcpy(at + j, &low, sizeof low);
                memcpy(under + j, &high, sizeof high);
            }
        }
        double sums[WIDTH] = {0};
        for (int64_t i = first; i < end; i++)
            for (int64_t j = 0; j < WIDTH; j++)
                sums[j] += scratch[i * WIDTH + j];
        for (int64_t j = 0; j < width; j++)
            out[start + j] = sums[j] / (double)(end - first);
    }
    return 0;
}
