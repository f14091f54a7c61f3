/* The exact sum of plan/aggregate/exact.py: the same digits, read in one pass; and what they come to. Built for float,
   and for double (WIDE).

   A contribution keeps the leading digits of each block of coordinates, two in float and three in double, from the place
   of the block's largest number on. What is left of x, plus 1.5·2^(52 + 26 j) and minus it again, is the digit of place j.
   Sums of weighted digits are exact in double. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { ADDED = 1, REFUSED = 2 };

#define WIDTH 26
#define BLOCK 4096
#define PIECE 512 /* coordinates whose two sums stay in the nearest memory */
#define TOGETHER 4 /* clients read side by side */
#define LINE 64    /* bytes that come from memory together */
#define PLACES 81 /* there can be */
#define EMPTY (-128)
#define BEYOND 127 /* the place of a number that is not finite, or so large that it cannot be added */

#ifdef WIDE
#define REAL double
#define BITS uint64_t
#define SIGNLESS (~0ull >> 1)
#define FREXP frexp
#define KEPT 3
#define MOST 0x7830000000000000ull /* 2^900 */
#else
#define REAL float
#define BITS uint32_t
#define SIGNLESS (~0u >> 1)
#define FREXP frexpf
#define KEPT 2
#define MOST 0x7f7fffffu /* the largest of all */
#endif

typedef int64_t I;

typedef struct {
    const REAL *rows;
    I clients, d, stride;
    I lowest, threads;
    int8_t *tops;            /* [block][client]: the place of the largest number, EMPTY for zeros */
    int8_t *done;            /* [block]: ADDED, or REFUSED where a place had no digits yet or a number is BEYOND */
    const double *weights;   /* [client] */
    double *const *digits;   /* of places lowest …, as far as there are any */
    const int8_t *fresh;     /* of places lowest …: whether nothing stands there yet, not even zeros */
    const REAL *peaks;       /* [client][block]: the largest number without its sign, where it is known; or 0 */
} Job;

typedef struct {
    const Job *job;
    int (*each)(const Job *, I block, I next);
    _Atomic I next;
    _Atomic int over;
} Crew;

static I least(I a, I b) { return a < b ? a : b; }

static I begins(const Job *job, I block, I *length) {
    const I at = block * BLOCK;
    *length = least(job->d - at, BLOCK);
    return at;
}

static int find(const Job *job, I block, I next) {
    I n;
    (void)next;
    const I at = begins(job, block, &n), blocks = (job->d + BLOCK - 1) / BLOCK;
    for (I k = 0; k < job->clients; k++) {
        const REAL *x = job->rows + k * job->stride + at;
        BITS most = 0; /* without their signs, numbers are in the order of their bits */
        if (job->peaks) memcpy(&most, job->peaks + k * blocks + block, sizeof most);
        for (I i = 0; !job->peaks && i < n; i++) {
            BITS bits;
            memcpy(&bits, x + i, sizeof bits);
            bits &= SIGNLESS;
            most = bits > most ? bits : most;
        }
        REAL largest;
        int exponent;
        memcpy(&largest, &most, sizeof largest);
        FREXP(largest, &exponent);
        I top = exponent >= 0 ? exponent / WIDTH : -((WIDTH - 1 - exponent) / WIDTH);
        top = top < job->lowest ? job->lowest : top;
        job->tops[block * job->clients + k] = most > MOST ? BEYOND : (int8_t)(most ? top : EMPTY);
    }
    return 0;
}

/* Add the digits of some clients' weighted numbers, read side by side, to the sums of each place. */
static inline __attribute__((always_inline)) void taken(const int many, const REAL *const *x, const double *w,
                                                        const double *anchor, double sum[KEPT][PIECE], I m) {
    for (I i = 0; i < m; i++) {
        double s[KEPT];
#pragma GCC unroll 3
        for (int j = 0; j < KEPT; j++) s[j] = sum[j][i];
#pragma GCC unroll 4
        for (int c = 0; c < many; c++) {
            double left = x[c][i];
#pragma GCC unroll 3
            for (int j = 0; j < KEPT; j++) {
                const double digit = left + anchor[j] - anchor[j];
                s[j] += w[c] * digit;
                left -= digit;
            }
        }
#pragma GCC unroll 3
        for (int j = 0; j < KEPT; j++) sum[j][i] = s[j];
    }
}

#define ALIKE (KEPT == 2) /* two digits together are a whole number of 51 bits and a sign: one addition, not two */
#define MOST_ALIKE 4096   /* such numbers have a sum of 63 bits */

/* Add both digits at once of some clients' numbers to whole sums: what is left of x + 1.5·2^(52 + 26 j) are its bits. */
static inline __attribute__((always_inline)) void counted(const int many, const REAL *const *x, double anchor,
                                                          uint64_t sum[PIECE], I m) {
    for (I i = 0; i < m; i++) {
        uint64_t s = sum[i];
#pragma GCC unroll 4
        for (int c = 0; c < many; c++) {
            const double moved = x[c][i] + anchor;
            uint64_t bits;
            memcpy(&bits, &moved, sizeof bits);
            s += bits;
        }
        sum[i] = s;
    }
}

static inline double real(int64_t n) { /* |n| < 2^51; not every machine has an instruction for vectors of them */
    const double anchor = 0x1.8p52;
    int64_t bits;
    memcpy(&bits, &anchor, sizeof bits);
    bits += n;
    double moved;
    memcpy(&moved, &bits, sizeof moved);
    return moved - anchor;
}

/* Digits of `many` clients who weigh the same, out of their whole sum, into those of two places. */
static void parted(const uint64_t *sum, I many, double anchor, double weight, I place, double *high, double *low, I m) {
    uint64_t nothing;
    memcpy(&nothing, &anchor, sizeof nothing);
    nothing *= (uint64_t)many;
    const double unit = ldexp(weight, WIDTH * (int)(place - 1)), above = ldexp(weight, WIDTH * (int)place);
    for (I i = 0; i < m; i++) {
        const int64_t all = (int64_t)(sum[i] - nothing), most = (all + (1 << (WIDTH - 1))) >> WIDTH;
        high[i] += real(most) * above;
        low[i] += real(all - most * (1 << WIDTH)) * unit;
    }
}

/* Whether all is over: nothing is gained by going on where a place is missing. */
static int fold(const Job *job, I block, I next) {
    I n;
    const I at = begins(job, block, &n);
    if (job->done[block]) return 0;
    job->done[block] = REFUSED;
    find(job, block, next);
    const int8_t *tops = job->tops + block * job->clients;
    int low = 127, high = EMPTY;
    for (I k = 0; k < job->clients; k++)
        if (tops[k] != EMPTY) {
            low = tops[k] < low ? tops[k] : low;
            high = tops[k] > high ? tops[k] : high;
        }
    if (high == BEYOND) return 1;
    for (I k = 0; k < job->clients; k++)
        for (int j = 0; tops[k] != EMPTY && j < KEPT && tops[k] - j >= job->lowest; j++)
            if (!job->digits[tops[k] - j - job->lowest]) return 1;
    job->done[block] = ADDED;
    int alike = ALIKE && job->clients <= MOST_ALIKE;
    for (I k = 1; alike && k < job->clients; k++) alike = job->weights[k] == job->weights[0];
    for (I p = 0; p < PLACES; p++)
        if (job->fresh[p]) memset(job->digits[p] + at, 0, sizeof(double) * n);
    for (int top = high; top >= low && top != EMPTY; top--) {
        const int kept = top - KEPT >= job->lowest ? KEPT : (int)(top - job->lowest) + 1;
        double anchor[KEPT];
        for (int j = 0; j < KEPT; j++) anchor[j] = ldexp(1.5, 52 + WIDTH * (top - j < job->lowest ? top : top - j));
        const int whole = alike && kept == KEPT;
        for (I from = 0; from < n; from += PIECE) {
            const I m = least(n - from, PIECE), later = from + PIECE < n ? at + from + PIECE : next * BLOCK;
            const I further = later - at - from, ahead = least(PIECE, job->d - later); /* what is read after all of this */
            double sum[KEPT][PIECE];
            uint64_t both[PIECE];
            I some = 0;
            for (I k = 0, n_at; k < job->clients; k = n_at) {
                const REAL *x[TOGETHER];
                double w[TOGETHER];
                int many = 0;
                for (n_at = k; n_at < job->clients && many < TOGETHER; n_at++) {
                    if (tops[n_at] != top) continue;
                    x[many] = job->rows + n_at * job->stride + at + from, w[many++] = job->weights[n_at];
                }
                if (!many) break;
                if (!some && whole) memset(both, 0, sizeof both);
                if (!some && !whole) memset(sum, 0, sizeof sum);
                some += many;
                for (int c = 0; c < many; c++) /* where nobody expects a reader */
                    for (I i = 0; i < ahead; i += LINE / (I)sizeof(REAL)) __builtin_prefetch(x[c] + further + i, 0, 2);
                if (whole && many == TOGETHER)
                    counted(TOGETHER, x, anchor[KEPT - 1], both, m);
                else if (whole)
                    for (int c = 0; c < many; c++) counted(1, x + c, anchor[KEPT - 1], both, m);
                else if (many == TOGETHER)
                    taken(TOGETHER, x, w, anchor, sum, m);
                else
                    for (int c = 0; c < many; c++) taken(1, x + c, w + c, anchor, sum, m);
            }
            if (some && whole) {
                double *const *digits = job->digits + top - job->lowest;
                parted(both, some, anchor[KEPT - 1], job->weights[0], top, digits[0] + at + from, digits[-1] + at + from, m);
                continue;
            }
            for (int j = 0; some && j < kept; j++) {
                double *digit = job->digits[top - j - job->lowest] + at + from;
                for (I i = 0; i < m; i++) digit[i] += sum[j][i];
            }
        }
    }
    return 0;
}

static void *work(void *given) {
    Crew *crew = given;
    const I blocks = (crew->job->d + BLOCK - 1) / BLOCK;
    I next = atomic_fetch_add(&crew->next, 1);
    for (I block; (block = next) < blocks && !atomic_load(&crew->over);) {
        next = atomic_fetch_add(&crew->next, 1);
        if (crew->each(crew->job, block, next)) atomic_store(&crew->over, 1);
    }
    return 0;
}

static void all(const Job *job, int (*each)(const Job *, I, I)) {
    Crew crew = {.job = job, .each = each};
    const I more = job->threads - 1;
    pthread_t threads[more > 0 ? more : 1];
    I begun = 0;
    while (begun < more && !pthread_create(&threads[begun], 0, work, &crew)) begun++;
    work(&crew);
    for (I i = 0; i < begun; i++) pthread_join(threads[i], 0);
}

/* The place of the largest number of every block. */
void tops(const Job *job) { all(job, find); }

/* Add every block that has not been, until one of them is refused. */
void add(const Job *job) { all(job, fold); }

#ifdef WIDE

#define SHARE 64 /* coordinates whose digits, of all places there are, stay in the nearest memory */

/* out = Σ of digits of some places side by side, from `lowest` on; a pointer of 0 is a place without any.

   What a place has too much is carried to the next, then they are added from the largest place down: first as they
   are, for the sign of the sum, which is that of its first digit; then by absolute value. */
void total(const double *const *digits, I places, I lowest, I d, double *out) {
    for (I from = 0; from < d; from += SHARE) {
        const I m = least(d - from, SHARE);
        double kept[places][SHARE], sign[SHARE];
        for (I i = 0; i < SHARE; i++) sign[i] = 1;
        for (int signless = 0; signless < 2; signless++) {
            double carry[SHARE] = {0}, lead[SHARE] = {0};
            for (I p = 0; p < places; p++) {
                const double unit = ldexp(1, WIDTH * (int)(lowest + p + 1));
                const double *digit = digits[p] ? digits[p] + from : 0;
                const int last = p + 1 == places;
                for (I i = 0; i < m; i++) {
                    const double now = digit ? digit[i] * sign[i] + carry[i] : carry[i];
                    carry[i] = last ? 0 : floor(now / unit + 0.5) * unit;
                    kept[p][i] = now - carry[i];
                    lead[i] = kept[p][i] == 0 ? lead[i] : kept[p][i];
                }
            }
            for (I i = 0; !signless && i < m; i++) sign[i] = lead[i] < 0 ? -1 : 1;
        }
        for (I i = 0; i < m; i++) out[from + i] = kept[places - 1][i];
        for (I p = places - 2; p >= 0; p--)
            for (I i = 0; i < m; i++) out[from + i] += kept[p][i];
        for (I i = 0; i < m; i++) out[from + i] *= sign[i];
    }
}

#endif
