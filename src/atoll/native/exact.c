/* The exact sum of plan/aggregate/exact.py for float32: the same digits, read in one pass.

   A contribution keeps two digits of each block of coordinates, at the place of the block's largest number and at the
   one below; x + 1.5·2^(52 + 26 j) − 1.5·2^(52 + 26 j) is the digit of place j. Sums of digits are exact in double. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 26
#define BLOCK 4096
#define PIECE 512 /* coordinates whose two sums stay in the nearest memory */
#define EMPTY (-128)

typedef int64_t I;

typedef struct {
    const float *rows;
    I clients, d, stride;
    I lowest, threads;
    int8_t *tops;            /* [block][client]: the place of the largest number, EMPTY for zeros */
    const double *weights;   /* [client] */
    double *const *digits;   /* of places lowest … */
} Job;

typedef struct {
    const Job *job;
    void (*each)(const Job *, I block);
    _Atomic I next;
} Crew;

static I begins(const Job *job, I block, I *length) {
    const I at = block * BLOCK;
    *length = job->d - at < BLOCK ? job->d - at : BLOCK;
    return at;
}

static void find(const Job *job, I block) {
    I n;
    const I at = begins(job, block, &n);
    for (I k = 0; k < job->clients; k++) {
        const float *x = job->rows + k * job->stride + at;
        uint32_t most = 0; /* without their signs, floats are in the order of their bits */
        for (I i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float largest;
        int exponent;
        memcpy(&largest, &most, 4);
        frexpf(largest, &exponent);
        I top = exponent >= 0 ? exponent / WIDTH : -((WIDTH - 1 - exponent) / WIDTH);
        top = top < job->lowest ? job->lowest : top;
        job->tops[block * job->clients + k] = (int8_t)(most ? top : EMPTY);
    }
}

static void fold(const Job *job, I block) {
    I n;
    const I at = begins(job, block, &n);
    const int8_t *tops = job->tops + block * job->clients;
    int low = 127, high = EMPTY;
    for (I k = 0; k < job->clients; k++)
        if (tops[k] != EMPTY) {
            low = tops[k] < low ? tops[k] : low;
            high = tops[k] > high ? tops[k] : high;
        }
    for (int top = high; top >= low && top != EMPTY; top--) {
        const double upper = ldexp(1.5, 52 + WIDTH * top), lower = ldexp(1.5, 52 + WIDTH * (top - 1));
        const int two = top > job->lowest;
        for (I from = 0; from < n; from += PIECE) {
            const I m = n - from < PIECE ? n - from : PIECE;
            double a[PIECE], b[PIECE];
            int some = 0;
            for (I k = 0; k < job->clients; k++) {
                if (tops[k] != top) continue;
                if (!some) memset(a, 0, sizeof a), memset(b, 0, sizeof b);
                some = 1;
                const float *x = job->rows + k * job->stride + at + from;
                const double w = job->weights[k];
                for (I i = 0; i < m; i++) {
                    const double y = x[i], first = y + upper - upper;
                    a[i] += w * first;
                    b[i] += w * (y - first + lower - lower);
                }
            }
            if (!some) continue;
            double *high_digit = job->digits[top - job->lowest] + at + from;
            for (I i = 0; i < m; i++) high_digit[i] += a[i];
            if (!two) continue;
            double *low_digit = job->digits[top - 1 - job->lowest] + at + from;
            for (I i = 0; i < m; i++) low_digit[i] += b[i];
        }
    }
}

static void *work(void *given) {
    Crew *crew = given;
    const I blocks = (crew->job->d + BLOCK - 1) / BLOCK;
    for (I b; (b = atomic_fetch_add(&crew->next, 1)) < blocks;) crew->each(crew->job, b);
    return 0;
}

static void all(const Job *job, void (*each)(const Job *, I)) {
    Crew crew = {.job = job, .each = each};
    const I more = job->threads - 1;
    pthread_t threads[more > 0 ? more : 1];
    I begun = 0;
    while (begun < more && !pthread_create(&threads[begun], 0, work, &crew)) begun++;
    work(&crew);
    for (I i = 0; i < begun; i++) pthread_join(threads[i], 0);
}

void tops(const Job *job) { all(job, find); }
void add(const Job *job) { all(job, fold); }
