/* The exact sum of plan/aggregate/exact.py: the same digits from one pass over the rows, and their total. Compiled for
   float, and for double (WIDE).

   A contribution keeps the leading digits of each block of coordinates: two digits for float, three for double,
   counted from the place of the block's largest number. If r is the rest of a number after its higher digits, then
   r + 1.5·2^(52 + 26 j) − 1.5·2^(52 + 26 j) is its digit of place j. Sums of weighted digits are exact in double. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, NO_MEMORY = 1 };
enum { ADDED = 1, REFUSED = 2 };

#define WIDTH 26
#define BLOCK 4096
#define TILE 512 /* coordinates whose sums stay in the L1 cache */
#define CLIENTS_AT_ONCE 4 /* clients in one pass over the sums */
#define CACHE_LINE 64 /* bytes */
#define MAX_PLACES 81 /* places of a float64 */
#define EMPTY (-128) /* the place of a block of zeros */
#define NOT_ADDABLE 127 /* the place of a block with NaN, infinity or a number above the limit */

#ifdef WIDE
#define REAL double
#define BITS uint64_t
#define ABS_MASK (~0ull >> 1)
#define FREXP frexp
#define DIGITS 3
#define MAX_BITS 0x7830000000000000ull /* 2^900 */
#else
#define REAL float
#define BITS uint32_t
#define ABS_MASK (~0u >> 1)
#define FREXP frexpf
#define DIGITS 2
#define MAX_BITS 0x7f7fffffu /* the largest finite float */
#endif

typedef int64_t I;

/* The struct that Python fills, declared as a list of fields, so that size, field count and field names are exported
   from the declaration itself. The loader compares them with the Python declaration. */
#define MEMBER(type, name) type name;
#define COUNT(type, name) +1
#define NAME(type, name) " " #name
#define SHARED_STRUCT(Struct, FIELDS)                                                                                 \
    typedef struct {                                                                                                  \
        FIELDS(MEMBER)                                                                                                \
    } Struct;                                                                                                         \
    const int64_t Struct##_size = sizeof(Struct), Struct##_count = FIELDS(COUNT);                                     \
    const char Struct##_fields[] = FIELDS(NAME);

#define JOB_FIELDS(F)                                                                                                 \
    F(const REAL *, rows)                                                                                             \
    F(I, clients) F(I, d) F(I, stride)                                                                                \
    F(I, lowest)             /* the lowest place */                                                                   \
    F(I, threads)                                                                                                     \
    F(int8_t *, tops)        /* [block][client]: place of the largest number, EMPTY or NOT_ADDABLE */                 \
    F(int8_t *, done)        /* [block]: ADDED, or REFUSED if a place has no digits or a number is NOT_ADDABLE */     \
    F(const double *, weights) /* [client] */                                                                         \
    F(double *const *, digits) /* [place from `lowest` on]: sums, or 0 */                                             \
    F(const int8_t *, fresh) /* [place from `lowest` on]: whether its sums are not initialised */                     \
    F(const REAL *, peaks)   /* [client][block]: the largest |number|; or 0 if it is not known */
SHARED_STRUCT(Job, JOB_FIELDS)

/* State that the threads of a job share. */
typedef struct {
    const Job *job;
    int (*step)(const Job *, I block, I next); /* not 0: stop */
    _Atomic I next;
    _Atomic int stopped;
} JobThreads;

static I smaller(I a, I b) { return a < b ? a : b; }

/* The first coordinate of a block, and its length. */
static I block_start(const Job *job, I block, I *length) {
    const I at = block * BLOCK;
    *length = smaller(job->d - at, BLOCK);
    return at;
}

/* Find the place of the largest number of a block, for each client. */
static int find_places(const Job *job, I block, I next) {
    I n;
    (void)next;
    const I at = block_start(job, block, &n), blocks = (job->d + BLOCK - 1) / BLOCK;
    for (I k = 0; k < job->clients; k++) {
        const REAL *x = job->rows + k * job->stride + at;
        BITS most = 0; /* absolute values have the order of their bits */
        if (job->peaks) memcpy(&most, job->peaks + k * blocks + block, sizeof most);
        for (I i = 0; !job->peaks && i < n; i++) {
            BITS bits;
            memcpy(&bits, x + i, sizeof bits);
            bits &= ABS_MASK;
            most = bits > most ? bits : most;
        }
        REAL largest;
        int exponent;
        memcpy(&largest, &most, sizeof largest);
        FREXP(largest, &exponent);
        I top = exponent >= 0 ? exponent / WIDTH : -((WIDTH - 1 - exponent) / WIDTH);
        top = top < job->lowest ? job->lowest : top;
        job->tops[block * job->clients + k] = most > MAX_BITS ? NOT_ADDABLE : (int8_t)(most ? top : EMPTY);
    }
    return 0;
}

/* Add the weighted digits of `count` clients to the sum of each place. */
static inline __attribute__((always_inline)) void add_digits(const int count, const REAL *const *x, const double *w,
                                                             const double *anchor, double sum[DIGITS][TILE], I m) {
    for (I i = 0; i < m; i++) {
        double s[DIGITS];
#pragma GCC unroll 3
        for (int j = 0; j < DIGITS; j++) s[j] = sum[j][i];
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) {
            double rest = x[c][i];
#pragma GCC unroll 3
            for (int j = 0; j < DIGITS; j++) {
                const double digit = rest + anchor[j] - anchor[j];
                s[j] += w[c] * digit;
                rest -= digit;
            }
        }
#pragma GCC unroll 3
        for (int j = 0; j < DIGITS; j++) sum[j][i] = s[j];
    }
}

#define HAS_PAIRS (DIGITS == 2) /* two digits form an integer of 51 bits and a sign, so one addition adds both */
#define MAX_PAIRS 4096          /* the sum of this number of pairs fits 63 bits */

/* Add both digits of `count` clients to integer sums: the low bits of x + 1.5·2^(52 + 26 j) are the pair of digits. */
static inline __attribute__((always_inline)) void add_pairs(const int count, const REAL *const *x, double anchor,
                                                            uint64_t sum[TILE], I m) {
    for (I i = 0; i < m; i++) {
        uint64_t s = sum[i];
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) {
            const double moved = x[c][i] + anchor;
            uint64_t bits;
            memcpy(&bits, &moved, sizeof bits);
            s += bits;
        }
        sum[i] = s;
    }
}

/* n as a double, |n| < 2^51. Vectorised, unlike a cast: AVX2 cannot convert vectors of int64. */
static inline double to_double(int64_t n) {
    const double anchor = 0x1.8p52;
    int64_t bits;
    memcpy(&bits, &anchor, sizeof bits);
    bits += n;
    double moved;
    memcpy(&moved, &bits, sizeof moved);
    return moved - anchor;
}

/* Split the integer sum of `count` clients of equal weight into the digits of two places. */
static void split_digits(const uint64_t *sum, I count, double anchor, double weight, I place, double *high, double *low,
                         I m) {
    uint64_t anchors;
    memcpy(&anchors, &anchor, sizeof anchors);
    anchors *= (uint64_t)count;
    const double unit = ldexp(weight, WIDTH * (int)(place - 1)), above = ldexp(weight, WIDTH * (int)place);
    for (I i = 0; i < m; i++) {
        const int64_t pair = (int64_t)(sum[i] - anchors), upper = (pair + (1 << (WIDTH - 1))) >> WIDTH;
        high[i] += to_double(upper) * above;
        low[i] += to_double(pair - upper * (1 << WIDTH)) * unit;
    }
}

/* Add one block. If it is refused, the result 1 stops all threads: the caller must first create the missing place. */
static int add_block(const Job *job, I block, I next) {
    I n;
    const I at = block_start(job, block, &n);
    if (job->done[block]) return 0;
    job->done[block] = REFUSED;
    find_places(job, block, next);
    const int8_t *tops = job->tops + block * job->clients;
    int low = 127, high = EMPTY;
    for (I k = 0; k < job->clients; k++)
        if (tops[k] != EMPTY) {
            low = tops[k] < low ? tops[k] : low;
            high = tops[k] > high ? tops[k] : high;
        }
    if (high == NOT_ADDABLE) return 1;
    for (I k = 0; k < job->clients; k++)
        for (int j = 0; tops[k] != EMPTY && j < DIGITS && tops[k] - j >= job->lowest; j++)
            if (!job->digits[tops[k] - j - job->lowest]) return 1;
    job->done[block] = ADDED;
    int equal_weights = HAS_PAIRS && job->clients <= MAX_PAIRS;
    for (I k = 1; equal_weights && k < job->clients; k++) equal_weights = job->weights[k] == job->weights[0];
    for (I p = 0; p < MAX_PLACES; p++)
        if (job->fresh[p]) memset(job->digits[p] + at, 0, sizeof(double) * n);
    for (int top = high; top >= low && top != EMPTY; top--) {
        const int kept = top - DIGITS >= job->lowest ? DIGITS : (int)(top - job->lowest) + 1;
        double anchor[DIGITS];
        for (int j = 0; j < DIGITS; j++) anchor[j] = ldexp(1.5, 52 + WIDTH * (top - j < job->lowest ? top : top - j));
        const int whole = equal_weights && kept == DIGITS;
        for (I from = 0; from < n; from += TILE) {
            const I m = smaller(n - from, TILE), later = from + TILE < n ? at + from + TILE : next * BLOCK;
            const I further = later - at - from, ahead = smaller(TILE, job->d - later); /* of the next tile */
            double sum[DIGITS][TILE];
            uint64_t both[TILE];
            I added = 0;
            for (I k = 0, n_at; k < job->clients; k = n_at) {
                const REAL *x[CLIENTS_AT_ONCE];
                double w[CLIENTS_AT_ONCE];
                int got = 0;
                for (n_at = k; n_at < job->clients && got < CLIENTS_AT_ONCE; n_at++) {
                    if (tops[n_at] != top) continue;
                    x[got] = job->rows + n_at * job->stride + at + from, w[got++] = job->weights[n_at];
                }
                if (!got) break;
                if (!added && whole) memset(both, 0, sizeof both);
                if (!added && !whole) memset(sum, 0, sizeof sum);
                added += got;
                for (int c = 0; c < got; c++) /* beyond the range of the hardware prefetcher */
                    for (I i = 0; i < ahead; i += CACHE_LINE / (I)sizeof(REAL))
                        __builtin_prefetch(x[c] + further + i, 0, 2);
                if (whole && got == CLIENTS_AT_ONCE)
                    add_pairs(CLIENTS_AT_ONCE, x, anchor[DIGITS - 1], both, m);
                else if (whole)
                    for (int c = 0; c < got; c++) add_pairs(1, x + c, anchor[DIGITS - 1], both, m);
                else if (got == CLIENTS_AT_ONCE)
                    add_digits(CLIENTS_AT_ONCE, x, w, anchor, sum, m);
                else
                    for (int c = 0; c < got; c++) add_digits(1, x + c, w + c, anchor, sum, m);
            }
            if (added && whole) {
                double *const *digits = job->digits + top - job->lowest;
                split_digits(both, added, anchor[DIGITS - 1], job->weights[0], top, digits[0] + at + from,
                             digits[-1] + at + from, m);
                continue;
            }
            for (int j = 0; added && j < kept; j++) {
                double *digit = job->digits[top - j - job->lowest] + at + from;
                for (I i = 0; i < m; i++) digit[i] += sum[j][i];
            }
        }
    }
    return 0;
}

static void *thread_main(void *argument) {
    JobThreads *shared = argument;
    const I blocks = (shared->job->d + BLOCK - 1) / BLOCK;
    I next = atomic_fetch_add(&shared->next, 1);
    for (I block; (block = next) < blocks && !atomic_load(&shared->stopped);) {
        next = atomic_fetch_add(&shared->next, 1);
        if (shared->step(shared->job, block, next)) atomic_store(&shared->stopped, 1);
    }
    return 0;
}

/* Run a step on all blocks. After NO_MEMORY no block has been touched. */
static int run_threads(const Job *job, int (*step)(const Job *, I, I)) {
    JobThreads shared = {.job = job, .step = step};
    const I more = smaller(job->threads, (job->d + BLOCK - 1) / BLOCK) - 1;
    pthread_t *threads = more > 0 ? calloc(more, sizeof(pthread_t)) : 0;
    if (more > 0 && !threads) return NO_MEMORY;
    I started = 0;
    while (started < more && !pthread_create(&threads[started], 0, thread_main, &shared)) started++;
    thread_main(&shared); /* if a thread cannot be created, the others run its blocks */
    for (I i = 0; i < started; i++) pthread_join(threads[i], 0);
    free(threads);
    return DONE;
}

/* Find the place of the largest number of every block. */
int tops(const Job *job) { return run_threads(job, find_places); }

/* Add every block that is not added yet, until one of them is refused. */
int add(const Job *job) { return run_threads(job, add_block); }

#ifdef WIDE

#define TOTAL_TILE 64 /* coordinates whose digits of all places stay in the L1 cache */

/* out = Σ of the digits of adjacent places, from `lowest` on; a pointer of 0 is a place without digits.

   The excess of a place is carried to the next place; then the digits are added from the largest place down. The first
   pass finds the sign of each sum, which is the sign of its first digit. The second pass sums absolute values. */
int total(const double *const *digits, I places, I lowest, I d, double *out) {
    double(*kept)[TOTAL_TILE] = calloc(places, sizeof *kept), sign[TOTAL_TILE];
    if (!kept) return NO_MEMORY;
    for (I from = 0; from < d; from += TOTAL_TILE) {
        const I m = smaller(d - from, TOTAL_TILE);
        for (I i = 0; i < TOTAL_TILE; i++) sign[i] = 1;
        for (int pass = 0; pass < 2; pass++) {
            double carry[TOTAL_TILE] = {0}, lead[TOTAL_TILE] = {0};
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
            for (I i = 0; !pass && i < m; i++) sign[i] = lead[i] < 0 ? -1 : 1;
        }
        for (I i = 0; i < m; i++) out[from + i] = kept[places - 1][i];
        for (I p = places - 2; p >= 0; p--)
            for (I i = 0; i < m; i++) out[from + i] += kept[p][i];
        for (I i = 0; i < m; i++) out[from + i] *= sign[i];
    }
    free(kept);
    return DONE;
}

#endif
