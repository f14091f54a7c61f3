/* Gradient descent of many clients, each by itself, for stacks of convolutions and linear layers.

   A client's weights stay near its core from its first step to its last: a thread takes a client, makes all of its
   steps, writes down how far it has come, and takes the next. Every number is one chain of multiplications and
   additions in a fixed order, so its bits depend neither on the width of a vector, nor on neighbours, nor on threads.

   Linear and Conv2d are one thing here: a linear layer is a kernel as large as its input. A stage is such a layer, a
   bias, perhaps a ReLU, perhaps a pool; ReLU and a pool commute.

       maps      [row][y][x][channel], in a frame of zeros where the next convolution pads
       weights   [panel][tap][NR]: NR channels of the output side by side, a tap is (ky, kx, channel)

   All products are `tile`: MR × NR numbers at once, broadcast from one factor, read as vectors from the other. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef WIDE
#define REAL double
#define LOG log
#else
#define REAL float
#define LOG logf
#endif

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define VL ((int64_t)(BYTES / sizeof(REAL)))
#ifdef __AVX512F__
#define NV 1
#define MR 12
#define TALL 24 /* rows of a tile whose sums take nearly all registers */
#else
#define NV 2
#define MR 6
#define TALL 6
#endif
#define NR (NV * VL)
#define ROWS 32  /* of one client, worked on at once */
#define LINE 64  /* bytes that come from memory together */
#define NEAR (1 << 23) /* bytes that are still in a cache when they are read again */
#define AT_ONCE 8 /* lines asked for beside a tile of products */
#define TURN 128 /* numbers of a weight's row that are turned at once: a multiple of NR */

/* Read once into a register, not once for every product: two reads a product is all that a core has. */
#ifdef __AVX__
#define HELD(v) __asm__("" : "+v"(v))
#else
#define HELD(v) (void)(v)
#endif

/* Write a vector past the caches, and see to it that other threads see what was so written. */
#if defined(__AVX512F__)
#define STREAM(p, v) _mm512_stream_si512((void *)(p), (__m512i)(v))
#define STREAMED _mm_sfence()
#elif defined(__AVX__)
#define STREAM(p, v) _mm256_stream_si256((void *)(p), (__m256i)(v))
#define STREAMED _mm_sfence()
#else
#define STREAM(p, v) store(p, v)
#define STREAMED
#endif

#define INLINE static inline __attribute__((always_inline))
#define up(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

typedef int64_t I;
typedef REAL V __attribute__((vector_size(BYTES)));

enum { DONE = 0, NO_MEMORY = 1, NO_CLASS = 2 };
enum { GRADIENT = 0, UPDATE = 1, MODEL = 2 };

/* What Python tells of a stage, in this order. */
typedef struct {
    I relu;
    I channels, height, width;              /* of the input */
    I pad_y, pad_x;
    I out, kernel_y, kernel_x, stride_y, stride_x;
    I out_y, out_x;                         /* before the pool */
    I pool_y, pool_x, hop_y, hop_x;         /* a pool of 1 × 1 is none */
    I last_y, last_x;                       /* behind it */
    I weight, bias;                         /* where in θ; no bias: −1 */
} Told;

typedef struct {
    Told t;
    I frame_x;      /* width of the framed input */
    I in_stride;    /* numbers from one row's input to the next */
    I taps;         /* of one output: kernel_y · kernel_x · channels */
    I run, runs;    /* taps side by side in the input, and how many such runs */
    I wide;         /* output channels, whole panels */
    I pixels;       /* outputs of one row */
    int flat;       /* the kernel covers the input: rows go together, as in a linear layer */
    I at, bias_at;  /* of weights and bias among the packed ones */
    /* Where a pixel of the output goes: the next stage's input. */
    I to, to_y, to_x, to_c, to_stride;
    I in, grad, won; /* places of buffers */
    I spare;         /* from one input of the first stage to the other */
} Stage;

typedef struct {
    const I *told;
    I stages, squares;
    I d;
    const void *x;
    I bytes, features; /* whether x are bytes, worth 1/255 each */
    const void *y;
    I targets;
    const I *rows;
    const I *offsets, *widths, *lanes; /* of each step: where its rows begin, how many a client, clients at work */
    const I *counts;                   /* rows of a client in a step that count, a client after the other */
    const I *count_offsets;
    I steps, clients, threads;
    const REAL *theta;
    I theta_stride; /* 0: all begin at one θ */
    I asked;        /* the gradient of one step; or how far all led, or to which θ */
    double lr;
    REAL *out;
    REAL *losses; /* Σ of a client's rows in a step, as the counts stand */
    REAL *peaks;  /* of a client the largest number, without its sign, of every `block` of `out` */
    I block;
} Job;

typedef struct {
    const Job *job;
    Stage *stages;
    I packed, room; /* numbers of packed weights, of buffers */
    I rows;         /* the most at once */
    const REAL *start;
    _Atomic I next, trouble;
} Crew;

/* ---- small things ---- */

INLINE V load(const REAL *p) {
    V v;
    memcpy(&v, p, BYTES);
    return v;
}

INLINE void store(REAL *p, V v) { memcpy(p, &v, BYTES); }

#ifdef WIDE
typedef int64_t Z;
typedef uint64_t U;
#define SIGNLESS INT64_MAX
#define FRACTION 52
#define LEAST -708 /* below it e^x is no normal number */
#define TERMS 13
#else
typedef int32_t Z;
typedef uint32_t U;
#define SIGNLESS INT32_MAX
#define FRACTION 23
#define LEAST -87
#define TERMS 7
#endif
typedef Z M __attribute__((vector_size(BYTES)));
typedef U N __attribute__((vector_size(BYTES)));

INLINE V chosen(M where, V a, V b) { return (V)((where & (M)a) | (~where & (M)b)); }

/* n ≤ VL numbers, `step` apart; what is not there is 0. */
INLINE V gathered(const REAL *p, I n, I step) {
    if (n == VL && step == 1) return load(p);
    REAL some[BYTES / sizeof(REAL)] = {0};
    for (I i = 0; i < n; i++) some[i] = p[i * step];
    return load(some);
}

INLINE void scattered(REAL *p, I n, I step, V v) {
    if (n == VL && step == 1) {
        store(p, v);
        return;
    }
    REAL some[BYTES / sizeof(REAL)];
    store(some, v);
    for (I i = 0; i < n; i++) p[i * step] = some[i];
}

INLINE I least(I a, I b) { return a < b ? a : b; }

/* e^x for x ≤ 0, or NaN: 2^n Σ r^i / i!, x = n ln 2 + r, |r| ≤ ln 2 / 2. What would be no normal number is 0. */
INLINE V exponential(V x) {
    static const REAL each[] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const REAL ln2 = 0.693359375, rest = -2.1219444005469058e-4; /* n · ln2 has so few bits that it is exact */
    const REAL anchor = (REAL)1.5 * ((Z)1 << FRACTION);
    const V moved = x * (REAL)1.4426950408889634 + anchor;
    const V n = moved - anchor, r = (x - n * ln2) - n * rest;
    V sum = (V){0} + each[TERMS];
#pragma GCC unroll 13
    for (int i = TERMS - 1; i >= 0; i--) sum = each[i] + sum * r;
    /* Lanes below LEAST overflow and are discarded afterwards. Unsigned lanes wrap; in signed ones it is undefined. */
    const N power = ((N)moved - (N)((V){0} + anchor)) << FRACTION;
    return chosen(x != x, x, chosen(x < LEAST, (V){0}, (V)((N)sum + power)));
}

/* Where the factors of a tile lie: `runs` runs of `n` terms, and from one to the next. */
typedef struct {
    I runs, n;
    I a_run, a_step, b_run, b_step;
} Terms;

/* How the rows of a lie: each begins at a[m]; or at a[0] + m; or its terms are at a[term] + a_run + m. */
enum { APART = 0, BESIDE = 1, ACROSS = 2 };

/* s = Σ a[m][…] · b[…] for m rows and NR columns. */
INLINE void tile(const int mr, const int lie, const REAL *const *a, const REAL *b, const Terms t, V (*s)[NV]) {
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) s[m][v] = (V){0};
    for (I i = 0; i < t.runs; i++) {
        const REAL *p = b + i * t.b_run;
        I at = lie == ACROSS ? t.a_run : i * t.a_run;
        for (I r = 0; r < t.n; r++, p += t.b_step, at += t.a_step) {
            const REAL *own = lie == ACROSS ? a[r] + at : a[0] + at;
            V read[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                read[v] = load(p + v * VL);
                HELD(read[v]);
            }
#pragma GCC unroll 24
            for (int m = 0; m < mr; m++) {
                const REAL x = lie == APART ? a[m][at] : own[m];
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) s[m][v] += x * read[v];
            }
        }
    }
}

#if MR > 6
#define MORE_CASES(call)                                                                                              \
    case 12: call(12); break;                                                                                         \
    case 11: call(11); break;                                                                                         \
    case 10: call(10); break;                                                                                         \
    case 9: call(9); break;                                                                                           \
    case 8: call(8); break;                                                                                           \
    case 7: call(7); break;
#else
#define MORE_CASES(call)
#endif

/* A case for each number of rows, so that the sums stay in registers until they are where they belong. */
#define CASES(mr, call)                                                                                               \
    switch (mr) {                                                                                                     \
    MORE_CASES(call)                                                                                                  \
    case 6: call(6); break;                                                                                           \
    case 5: call(5); break;                                                                                           \
    case 4: call(4); break;                                                                                           \
    case 3: call(3); break;                                                                                           \
    case 2: call(2); break;                                                                                           \
    default: call(1);                                                                                                 \
    }

/* How many of n rows are the next tile: MR, and the last two are as equal as can be, since a low tile waits for sums. */
INLINE I portion(I n) { return n >= 2 * MR ? MR : n > MR ? (n + 1) / 2 : n; }

/* dst[j][i] = src[i][j], 8 × 8. */
INLINE void flip8(const REAL *src, I from, REAL *dst, I to) {
#if !defined(WIDE)
    typedef float F __attribute__((vector_size(32)));
    F r[8], s[8];
    for (int i = 0; i < 8; i++) memcpy(&r[i], src + i * from, sizeof r[i]);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[i + 2 * j + 1] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) memcpy(dst + i * to, &s[i], sizeof s[i]);
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) dst[j * to + i] = src[i * from + j];
#endif
}

/* The same, NR × NR. */
static void flip(const REAL *src, I from, REAL *dst, I to) {
    for (I i = 0; i < NR; i += 8)
        for (I j = 0; j < NR; j += 8) flip8(src + i * from + j, from, dst + j * to + i, to);
}

/* ---- θ as torch has it, and packed ---- */

static void pack(const Stage *s, I stages, const REAL *theta, REAL *packed) {
    for (I k = 0; k < stages; k++, s++) {
        const Told *t = &s->t;
        const I area = t->kernel_y * t->kernel_x;
        REAL *w = packed + s->at;
        memset(w, 0, sizeof(REAL) * s->wide * s->taps);
        for (I p = 0; p < s->wide / NR; p++) {
            const I outs = least(NR, t->out - p * NR);
            const REAL *from = theta + t->weight + p * NR * s->taps;
            REAL *to = w + p * s->taps * NR;
            I turned = 0;
            for (; area == 1 && outs == NR && turned + NR <= s->taps; turned += NR)
                flip(from + turned, s->taps, to + turned * NR, NR);
            for (I o = 0; o < outs; o++)
                for (I c = turned; c < t->channels; c++)
                    for (I i = 0; i < area; i++) to[(i * t->channels + c) * NR + o] = from[o * s->taps + c * area + i];
        }
        memset(packed + s->bias_at, 0, sizeof(REAL) * s->wide);
        if (t->bias >= 0) memcpy(packed + s->bias_at, theta + t->bias, sizeof(REAL) * t->out);
    }
}

/* Where what a client comes to goes. */
typedef struct {
    const REAL *theta; /* that it is told from; 0: from nothing */
    REAL *to;
    U *peaks; /* the largest number of each block, without its sign: in the order of their bits NaN is above all */
    I block;
    int far;  /* more is written than the caches hold: memory need not be read to be written over */
} Out;

INLINE U larger(U most, REAL x) {
    U bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= SIGNLESS;
    return bits > most ? bits : most;
}

/* n numbers from `at` on. */
INLINE void put(const Out *out, I at, const REAL *now, I n) {
    for (I end; n; at += end, now += end, n -= end) {
        REAL *restrict to = out->to + at;
        const REAL *theta = out->theta ? out->theta + at : 0;
        const I block = at / out->block;
        end = least(n, (block + 1) * out->block - at);
        U most = out->peaks[block];
        I i = 0;
        if (out->far && end > 2 * VL) {
            for (; (uintptr_t)(to + i) % BYTES; i++) to[i] = theta ? theta[i] - now[i] : now[i], most = larger(most, to[i]);
            M top = {0};
            for (; i + VL <= end; i += VL) {
                const V x = theta ? load(theta + i) - load(now + i) : load(now + i);
                const M bits = (M)x & (Z)SIGNLESS;
                top = (M)chosen(bits > top, (V)bits, (V)top);
                STREAM(to + i, x);
            }
            for (I j = 0; j < VL; j++) most = (U)top[j] > most ? (U)top[j] : most;
        }
        for (; i < end; i++) to[i] = theta ? theta[i] - now[i] : now[i], most = larger(most, to[i]);
        out->peaks[block] = most;
    }
}

static void unpack(const Stage *s, I stages, const REAL *packed, const Out *out) {
    for (I k = 0; k < stages; k++, s++) {
        const Told *t = &s->t;
        const I area = t->kernel_y * t->kernel_x, taps = s->taps;
        const REAL *w = packed + s->at;
        for (I p = 0; p < s->wide / NR; p++) {
            const I outs = least(NR, t->out - p * NR);
            const REAL *panel = w + p * taps * NR;
            REAL block[NR * TURN];
            if (area == 1) {
                for (I r = 0; r < taps; r += TURN) {
                    const I n = least(TURN, taps - r);
                    I i = 0;
                    for (; i + NR <= n; i += NR) flip(panel + (r + i) * NR, NR, block + i, TURN);
                    for (; i < n; i++)
                        for (I o = 0; o < outs; o++) block[o * TURN + i] = panel[(r + i) * NR + o];
                    for (I o = 0; o < outs; o++) put(out, t->weight + (p * NR + o) * taps + r, block + o * TURN, n);
                }
                continue;
            }
            for (I o = 0; o < outs; o++)
                for (I c = 0; c < t->channels; c++)
                    for (I i = 0; i < area; i += TURN) {
                        const I n = least(TURN, area - i);
                        for (I j = 0; j < n; j++) block[j] = panel[((i + j) * t->channels + c) * NR + o];
                        put(out, t->weight + ((p * NR + o) * t->channels + c) * area + i, block, n);
                    }
        }
        if (t->bias >= 0) put(out, t->bias, packed + s->bias_at, t->out);
    }
}

/* Weights with the roles of input and output exchanged: [run][panel of taps][output][NR]. */
static void turn(const Stage *s, const REAL *w, REAL *turned) {
    const I taps = up(s->run, NR);
    for (I i = 0; i < s->runs; i++)
        for (I r = 0; r < taps; r += NR)
            for (I p = 0; p < s->wide / NR; p++) {
                REAL *to = turned + ((i * taps + r) * s->wide) + p * NR * NR;
                const REAL *from = w + (p * s->taps + i * s->run + r) * NR;
                if (r + NR <= s->run) {
                    flip(from, NR, to, NR);
                    continue;
                }
                for (I o = 0; o < NR; o++)
                    for (I j = 0; j < NR; j++) to[o * NR + j] = r + j < s->run ? from[j * NR + o] : 0;
            }
}

/* ---- a stage forward ---- */

/* Where the outputs of a stage are, one after the other: row, y and x, and where in the row their kernels begin. */
typedef struct {
    I row, y, x, at;
} Place;

INLINE Place next(const Stage *s, Place p) {
    const Told *t = &s->t;
    p.at += t->stride_x * t->channels;
    if (++p.x < t->out_x) return p;
    p.x = 0;
    if (++p.y == t->out_y) p.y = 0, p.row++;
    p.at = p.y * t->stride_y * s->frame_x * t->channels;
    return p;
}

INLINE void outputs(const int mr, const REAL *const *a, const REAL *b, const Terms t, const REAL *bias, REAL *out,
                    I wide) {
    V c[MR][NV];
    tile(mr, APART, a, b, t, c);
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(out + m * wide + v * VL, c[m][v] + load(bias + v * VL));
}

/* A panel of the outputs of some rows, [pixel][wide]. */
static void forward(const Stage *s, I p, const REAL *const *in, I rows, const REAL *w, const REAL *bias, REAL *out) {
    const I n = rows * s->pixels;
    const REAL *panel = w + p * s->taps * NR;
    const Terms t = {s->runs, s->run, s->frame_x * s->t.channels, 1, s->run * NR, NR};
    Place place = {0};
    for (I q = 0, mr; q < n; q += mr) {
        mr = portion(n - q);
        const REAL *a[MR];
        for (I m = 0; m < mr; m++, place = next(s, place)) a[m] = in[place.row] + place.at;
#define CALL(mr) outputs(mr, a, panel, t, bias + p * NR, out + q * s->wide + p * NR, s->wide)
        CASES(mr, CALL)
#undef CALL
    }
}

/* Pool and ReLU of one row, into the next stage's input; which neighbour won is kept. NaN wins. */
static void passed(const Stage *s, const REAL *from, REAL *to, REAL *won) {
    const Told *t = &s->t;
    const int pools = t->pool_y * t->pool_x > 1;
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const REAL *first = from + (y * t->hop_y * t->out_x + x * t->hop_x) * s->wide;
            REAL *at = to + s->to + y * s->to_y + x * s->to_x;
            for (I c = 0; c < t->out; c += VL) {
                V best = load(first + c), which = {0};
                for (I j = 0; j < t->pool_y; j++)
                    for (I i = !j; i < t->pool_x; i++) {
                        const V other = load(first + (j * t->out_x + i) * s->wide + c);
                        const M more = (other > best) | (other != other);
                        best = chosen(more, other, best);
                        which = chosen(more, (V){0} + (REAL)(j * t->pool_x + i), which);
                    }
                if (pools) store(won + (y * t->last_x + x) * s->wide + c, which);
                if (t->relu) best = chosen((best > 0) | (best != best), best, (V){0});
                scattered(at + c * s->to_c, least(VL, t->out - c), s->to_c, best);
            }
        }
}

/* ---- a stage backward ---- */

/* The gradient of one row's outputs before pool and ReLU, [pixel][wide]. */
static void returned(const Stage *s, const REAL *grad, const REAL *act, const REAL *won, REAL *dy) {
    const Told *t = &s->t;
    const int apart = t->hop_y >= t->pool_y && t->hop_x >= t->pool_x; /* no two pools have a neighbour in common */
    const int all = apart && t->last_y * t->pool_y * t->last_x * t->pool_x == s->pixels && s->wide - t->out < VL;
    if (!all) memset(dy, 0, sizeof(REAL) * s->pixels * s->wide);
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const I at = s->to + y * s->to_y + x * s->to_x;
            REAL *first = dy + (y * t->hop_y * t->out_x + x * t->hop_x) * s->wide;
            for (I c = 0; c < t->out; c += VL) {
                const I n = least(VL, t->out - c);
                V g = gathered(grad + at + c * s->to_c, n, s->to_c);
                if (t->relu) g = chosen(gathered(act + at + c * s->to_c, n, s->to_c) > 0, g, (V){0});
                if (t->pool_y * t->pool_x == 1) {
                    store(first + c, g);
                    continue;
                }
                const V which = load(won + (y * t->last_x + x) * s->wide + c);
                for (I j = 0; j < t->pool_y; j++)
                    for (I i = 0; i < t->pool_x; i++) {
                        REAL *into = first + (j * t->out_x + i) * s->wide + c;
                        const V mine = chosen(which == (V){0} + (REAL)(j * t->pool_x + i), g, (V){0});
                        store(into, apart ? mine : load(into) + mine);
                    }
            }
        }
}

INLINE void inputs(const int mr, const REAL *const *a, const REAL *b, const Terms t, REAL *const *to, int adds) {
    V c[MR][NV];
    tile(mr, APART, a, b, t, c);
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++) /* in turn: kernels side by side overlap */
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(to[m] + v * VL, adds ? load(to[m] + v * VL) + c[m][v] : c[m][v]);
}

/* The gradient of some rows' inputs: of a linear layer it is written, of a convolution added up. */
static void to_input(const Stage *s, const REAL *dy, I rows, const REAL *turned, REAL *grad) {
    const I taps = up(s->run, NR), n = rows * s->pixels;
    const Terms t = {1, s->t.out, 0, 1, 0, NR};
    for (I i = 0; i < s->runs; i++)
        for (I r = 0; r < taps; r += NR) {
            const REAL *panel = turned + (i * taps + r) * s->wide;
            REAL *first = grad + i * s->frame_x * s->t.channels + r;
            Place place = {0};
            for (I q = 0, mr; q < n; q += mr) {
                mr = portion(n - q);
                const REAL *a[MR];
                REAL *to[MR];
                for (I m = 0; m < mr; m++, place = next(s, place))
                    a[m] = dy + (q + m) * s->wide, to[m] = first + place.row * s->in_stride + place.at;
#define CALL(mr) inputs(mr, a, panel, t, to, !s->flat)
                CASES(mr, CALL)
#undef CALL
            }
        }
}

/* Rows of the data that are fetched while others are worked on. */
typedef struct {
    const char *data;
    const I *rows;
    I n, size, at;
} Coming;

typedef struct {
    REAL *w, *g, *turned, *flat, *room; /* packed weights, their gradient, scratch, buffers of all stages */
    /* The step of a first linear layer waits for the next batch: each panel is then read once for both. */
    I late;            /* rows of the batch that it was made on; 0: none */
    I turn;            /* which of two tables the rows of a batch stand in */
    const REAL *lines[2][ROWS];
    REAL *late_dy;
    int fresh;         /* the first layer's weights are still where all begin: its first step brings them here */
    Coming coming;
} Bench;

/* Fetch so many lines: few at a time, since a core waits for no more than some of them without standing still. */
INLINE void fetch(Coming *c, I lines) {
    for (; c->n && lines; lines--) {
        __builtin_prefetch(c->data + *c->rows * c->size + c->at);
        c->at += LINE;
        if (c->at >= c->size) c->at = 0, c->rows++, c->n--;
    }
}

INLINE void weights(const int mr, const int lie, const REAL *const *a, const REAL *b, const Terms t, REAL factor,
                    const REAL *from, REAL *to) {
    V c[TALL][NV];
    tile(mr, lie, a, b, t, c);
    REAL f = factor;
    __asm__("" : "+m"(f)); /* read again: while sums are taken, no register is left for it */
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++, to += NR, from += from ? NR : 0)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(to + v * VL, (from ? load(from + v * VL) : (V){0}) + f * c[m][v]);
}

/* Where the numbers of one stage go, weights and biases; and what they are added to, if anything. */
typedef struct {
    const REAL *from, *bias_from;
    REAL *to, *bias_to;
} Sink;

/* A panel of to ← from + factor · gradient of the weights, from some rows; dy [pixel][wide]. */
static void to_weights(const Stage *s, I p, const REAL *const *in, const REAL *dy, I rows, REAL factor, Sink sink,
                       Coming *coming) {
    const Told *t = &s->t;
    const I line = s->frame_x * t->channels, runs = s->flat ? 1 : t->out_y, n = s->flat ? rows : t->out_x;
    Terms terms = {runs, n, t->stride_y * line, s->flat ? 0 : t->stride_x * t->channels, n * s->wide, s->wide};
    const REAL *b = dy + p * NR;
    const REAL *from = sink.from ? sink.from + p * s->taps * NR : 0;
    REAL *to = sink.to + p * s->taps * NR;
    for (I i = 0; i < s->runs; i++)
        for (I q = 0, mr; q < s->run; q += mr) {
            const I left = s->run - q;
            mr = TALL > MR && left >= TALL ? TALL : portion(left);
            const REAL *a = in[0] + i * line + q;
            if (s->flat) terms.a_run = q;
#define CALL(mr) s->flat ? weights(mr, ACROSS, in, b, terms, factor, from, to)                                        \
                         : weights(mr, BESIDE, &a, b, terms, factor, from, to)
            if (mr > MR) CALL(TALL);
            else CASES(mr, CALL)
#undef CALL
            to += mr * NR, from += from ? mr * NR : 0;
            if (coming) fetch(coming, AT_ONCE);
        }
    for (I v = p * NR; t->bias >= 0 && v < (p + 1) * NR; v += VL) {
        V c = {0};
        for (I q = 0; q < runs * n; q++) c += load(dy + q * s->wide + v);
        store(sink.bias_to + v, sink.from ? load(sink.bias_from + v) + factor * c : factor * c);
    }
}

/* ---- the loss ---- */

/* −log softmax(z)[y] of a row, and share · its gradient in place; what stands behind the classes is anything. */
static REAL entropy(REAL *z, I classes, I y, REAL share) {
    REAL top = z[0], sum = 0;
    for (I c = 1; c < classes; c++) top = z[c] > top || z[c] != z[c] ? z[c] : top;
    const REAL given = z[y] - top;
    for (I c = 0; c < classes; c += VL) store(z + c, exponential(load(z + c) - top));
    for (I c = 0; c < classes; c++) sum += z[c];
    for (I c = 0; c < classes; c += VL) store(z + c, load(z + c) / sum * share);
    z[y] -= share;
    return LOG(sum) - given;
}

/* The mean over a row's targets of (z − y)², and share · its gradient in place. */
static REAL squared(REAL *z, I targets, const REAL *y, REAL share) {
    REAL sum = 0;
    for (I c = 0; c < targets; c++) {
        const REAL off = z[c] - y[c];
        sum += off * off;
        z[c] = off * (2 * share / targets);
    }
    return sum / targets;
}

/* ---- a step ---- */

static void down(REAL *restrict w, const REAL *restrict g, REAL lr, I n) {
    for (I i = 0; i < n; i++) w[i] -= lr * g[i];
}

INLINE const REAL *weights_of(const Crew *crew, const Bench *bench) { return bench->fresh ? crew->start : bench->w; }

/* The step that was left waiting, of one panel. */
static void caught_up(const Crew *crew, Bench *bench, I p) {
    const Stage *s = crew->stages;
    const REAL *from = weights_of(crew, bench);
    if (bench->late)
        to_weights(s, p, bench->lines[!bench->turn], bench->late_dy, bench->late, -(REAL)crew->job->lr,
                   (Sink){from + s->at, from + s->bias_at, bench->w + s->at, bench->w + s->bias_at}, &bench->coming);
}

/* n numbers of the data, `step` apart where they go. */
INLINE void read_line(const Job *job, I at, I n, REAL *to, I step) {
    if (job->bytes) {
        const uint8_t *from = (const uint8_t *)job->x + at;
        for (I i = 0; i < n; i++) to[i * step] = (REAL)((float)from[i] / 255.0f);
    } else {
        const REAL *from = (const REAL *)job->x + at;
        for (I i = 0; i < n; i++) to[i * step] = from[i];
    }
}

/* A row of the data where it lies, or, if no stage can read it there, in a buffer. */
static const REAL *read_row(const Job *job, const Stage *s, I row, REAL *to) {
    const Told *t = &s->t;
    const I area = t->height * t->width, whole = s->frame_x == t->width && (t->channels == 1 || area == 1);
    if (whole && !t->pad_y) {
        if (!job->bytes) return (const REAL *)job->x + row * job->features;
        read_line(job, row * job->features, job->features, to, 1);
        return to;
    }
    for (I c = 0; c < t->channels; c++)
        for (I y = 0; y < t->height; y++)
            read_line(job, row * job->features + c * area + y * t->width, t->width,
                      to + ((y + t->pad_y) * s->frame_x + t->pad_x) * t->channels + c, t->channels);
    return to;
}

/* Forward and back on n rows of at most ROWS: the gradient into g, or where they are the whole step, the step. */
static I pass(const Crew *crew, Bench *bench, const I *rows, const REAL *y, const I *classes, I n, REAL share,
              int first, int steps, REAL *loss) {
    const Job *job = crew->job;
    const REAL lr = (REAL)job->lr;
    const I stages = job->stages;
    const Stage *s = crew->stages;
    REAL *room = bench->room;
    const REAL *lines[ROWS], **first_lines = bench->lines[bench->turn];
    for (I b = 0; b < n; b++)
        first_lines[b] = read_row(job, s, rows[b], room + s->in + bench->turn * s->spare + b * s->in_stride);
    for (I k = 0; k < stages; k++, s++) {
        const REAL **in = k ? lines : first_lines;
        const I panels = s->wide / NR;
        for (I b = 0; k && b < n; b++) lines[b] = room + s->in + b * s->in_stride;
        if (s->flat) {
            for (I p = 0; p < panels; p++) {
                if (!k) caught_up(crew, bench, p);
                const REAL *w = k || bench->late ? bench->w : weights_of(crew, bench);
                forward(s, p, in, n, w + s->at, w + s->bias_at, bench->flat);
            }
            if (!k) bench->fresh = bench->fresh && !bench->late;
            for (I b = 0; k < stages - 1 && b < n; b++)
                passed(s, bench->flat + b * s->wide, room + s[1].in + b * s[1].in_stride, 0);
            continue;
        }
        const I kept = s->t.last_y * s->t.last_x * s->wide;
        for (I b = 0; b < n; b++) {
            for (I p = 0; p < panels; p++)
                forward(s, p, in + b, 1, bench->w + s->at, bench->w + s->bias_at, bench->flat);
            passed(s, bench->flat, room + s[1].in + b * s[1].in_stride, room + s->won + b * kept);
        }
    }
    const Stage *top = --s;
    const I classes_of = top->t.out;
    REAL *dy = bench->flat;
    for (I b = 0; b < n; b++) {
        REAL *z = dy + b * top->wide;
        if (job->squares) {
            *loss += squared(z, job->targets, y + b * job->targets, share);
        } else {
            if (classes[b] < 0 || classes[b] >= classes_of) return NO_CLASS;
            *loss += entropy(z, classes_of, classes[b], share);
        }
        memset(z + classes_of, 0, sizeof(REAL) * (top->wide - classes_of));
    }
    bench->late = 0;
    for (I k = stages - 1; k >= 0; k--, s--) {
        const REAL **in = k ? lines : first_lines, *next = room + s[1].grad, *act = room + s[1].in;
        REAL *grad = k ? room + s->grad : 0, *g = bench->g + s->at, *gb = bench->g + s->bias_at;
        REAL *w = bench->w + s->at, *wb = bench->w + s->bias_at;
        const I panels = s->wide / NR;
        for (I b = 0; k && b < n; b++) lines[b] = room + s->in + b * s->in_stride;
        if (k) turn(s, w, bench->turned);
        if (s->flat) {
            REAL *own = k ? dy : bench->late_dy;
            for (I b = 0; b < n; b++)
                if (k < stages - 1)
                    returned(s, next + b * s[1].in_stride, act + b * s[1].in_stride, 0, own + b * s->wide);
                else if (!k)
                    memcpy(own + b * s->wide, dy + b * s->wide, sizeof(REAL) * s->wide);
            if (k) to_input(s, own, n, bench->turned, grad);
            if (steps && !k) {
                bench->late = n, bench->turn = !bench->turn;
                continue;
            }
            const Sink sink = steps ? (Sink){w, wb, w, wb} : (Sink){first ? 0 : g, gb, g, gb};
            for (I p = 0; p < panels; p++) to_weights(s, p, in, own, n, steps ? -lr : 1, sink, 0);
            continue;
        }
        const I kept = s->t.last_y * s->t.last_x * s->wide;
        for (I b = 0; b < n; b++) {
            returned(s, next + b * s[1].in_stride, act + b * s[1].in_stride, room + s->won + b * kept, dy);
            if (k) {
                memset(grad + b * s->in_stride, 0, sizeof(REAL) * s->in_stride);
                to_input(s, dy, 1, bench->turned, grad + b * s->in_stride);
            }
            const Sink sink = {first && b == 0 ? 0 : g, gb, g, gb};
            for (I p = 0; p < panels; p++) to_weights(s, p, in + b, dy, 1, 1, sink, 0);
        }
        if (steps) down(w, g, lr, s->bias_at + s->wide - s->at);
    }
    return DONE;
}

/* All of a client's weights, and with them the step that was left waiting. */
static void settled(const Crew *crew, Bench *bench) {
    const Stage *s = crew->stages;
    const REAL *from = weights_of(crew, bench);
    for (I p = 0; p < s->wide / NR; p++) caught_up(crew, bench, p);
    if (!bench->late && bench->fresh) memcpy(bench->w, from, sizeof(REAL) * (s->bias_at + s->wide));
    bench->late = bench->fresh = 0;
}

/* The first rows of a client in a step, if it makes it: to be fetched. */
static Coming coming(const Job *job, I k, I i) {
    Coming c = {.data = job->x, .size = job->features * (job->bytes ? 1 : (I)sizeof(REAL))};
    if (k < job->clients && i < job->steps && k < job->lanes[i]) {
        c.rows = job->rows + job->offsets[i] + k * job->widths[i];
        c.n = least(job->counts[job->count_offsets[i] + k], ROWS);
    }
    return c;
}

/* All steps of one client, or its gradient; who is next is asked for in time to fetch its first rows. */
static I client(Crew *crew, Bench *bench, I k, I *next) {
    const Job *job = crew->job;
    const int descends = job->asked != GRADIENT;
    const Stage *s = crew->stages;
    const I later = s->flat ? s->bias_at + s->wide : 0; /* from where on weights are needed now */
    bench->fresh = !job->theta_stride && s->flat;
    if (job->theta_stride)
        pack(s, job->stages, job->theta + k * job->theta_stride, bench->w);
    else
        memcpy(bench->w + later, crew->start + later, sizeof(REAL) * (crew->packed - later));
    for (I i = 0; i < job->steps && k < job->lanes[i]; i++) {
        const I at = job->offsets[i] + k * job->widths[i], n = job->counts[job->count_offsets[i] + k];
        REAL *loss = job->losses + job->count_offsets[i] + k;
        *loss = 0;
        const int ends = i + 1 == job->steps || k >= job->lanes[i + 1];
        if (ends) *next = atomic_fetch_add(&crew->next, 1);
        bench->coming = ends ? coming(job, *next, 0) : coming(job, k, i + 1);
        if (!bench->late) fetch(&bench->coming, INT64_MAX); /* nothing comes by that could fetch them bit by bit */
        const I parts = (n + ROWS - 1) / ROWS; /* as equal as can be */
        if (parts > 1) settled(crew, bench);
        if (!n && !descends) memset(bench->g, 0, sizeof(REAL) * crew->packed);
        for (I p = 0, q = 0; p < parts; p++) {
            const I end = n * (p + 1) / parts;
            const I got = pass(crew, bench, job->rows + at + q, (const REAL *)job->y + (at + q) * job->targets,
                               (const I *)job->y + at + q, end - q, (REAL)1 / n, p == 0, descends && parts == 1, loss);
            if (got) return got;
            q = end;
        }
        if (descends && parts > 1) down(bench->w, bench->g, (REAL)job->lr, crew->packed);
    }
    if (descends) settled(crew, bench);
    const I blocks = (job->d + job->block - 1) / job->block;
    const Out out = {.theta = job->asked == UPDATE ? job->theta + k * job->theta_stride : 0,
                     .to = job->out + k * job->d,
                     .peaks = (U *)(job->peaks + k * blocks),
                     .block = job->block,
                     .far = job->clients * job->d * (I)sizeof(REAL) > NEAR};
    memset(out.peaks, 0, sizeof(U) * blocks);
    unpack(s, job->stages, descends ? bench->w : bench->g, &out);
    return DONE;
}

/* ---- threads ---- */

/* Memory is kept from one job to the next: what is new the kernel clears page by page, which takes as long as a job. */
#define SHELVES 64
static _Atomic(I *) shelves[SHELVES]; /* of numbers, how many there are, a line before them */

static REAL *borrowed(I n) {
    for (int i = 0; i < SHELVES; i++) {
        I *found = atomic_exchange(shelves + i, 0);
        if (found && *found >= n) return (REAL *)((char *)found + LINE);
        free(found);
    }
    I *made = aligned_alloc(LINE, LINE + up(n * (I)sizeof(REAL), LINE));
    if (!made) return 0;
    *made = n;
    return (REAL *)((char *)made + LINE);
}

static void brought_back(REAL *numbers) {
    if (!numbers) return;
    I *own = (I *)((char *)numbers - LINE);
    for (int i = 0; i < SHELVES; i++) {
        I *empty = 0;
        if (atomic_compare_exchange_strong(shelves + i, &empty, own)) return;
    }
    free(own);
}

static void *work(void *given) {
    Crew *crew = given;
    I turned = 0, flat = 0;
    for (const Stage *s = crew->stages; s < crew->stages + crew->job->stages; s++) {
        const I t = s->runs * up(s->run, NR) * s->wide, f = (s->flat ? crew->rows : s->pixels) * s->wide;
        turned = t > turned ? t : turned;
        flat = f > flat ? f : flat;
    }
    const I unit = LINE / sizeof(REAL), packed = up(crew->packed, unit), dy = crew->rows * crew->stages->wide;
    turned = up(turned, unit), flat = up(flat, unit);
    REAL *all = borrowed(2 * packed + turned + flat + up(dy, unit) + crew->room);
    if (!all) {
        atomic_store(&crew->trouble, NO_MEMORY);
        return 0;
    }
    Bench bench = {.w = all, .g = all + packed, .turned = all + 2 * packed};
    bench.flat = bench.turned + turned, bench.late_dy = bench.flat + flat, bench.room = bench.late_dy + up(dy, unit);
    memset(bench.g, 0, sizeof(REAL) * crew->packed);  /* what no parameter stands for stays zero */
    memset(bench.room, 0, sizeof(REAL) * crew->room); /* and so do frames */
    I next = 0;
    for (I k = atomic_fetch_add(&crew->next, 1); k < crew->job->clients && !atomic_load(&crew->trouble); k = next) {
        const I got = client(crew, &bench, k, &next);
        if (got) atomic_store(&crew->trouble, got);
    }
    brought_back(all);
    STREAMED;
    return 0;
}

static void laid(Crew *crew) {
    const Job *job = crew->job;
    I at = 0, room = 0;
    for (I i = 0; i < job->steps; i++) crew->rows = crew->rows > job->widths[i] ? crew->rows : job->widths[i];
    crew->rows = least(crew->rows, ROWS);
    for (I k = 0; k < job->stages; k++) {
        Stage *s = crew->stages + k;
        const Told *t = &s->t;
        s->frame_x = t->width + 2 * t->pad_x;
        s->in_stride = up((t->height + 2 * t->pad_y) * s->frame_x * t->channels, NR);
        s->taps = t->kernel_y * t->kernel_x * t->channels;
        s->pixels = t->out_y * t->out_x;
        s->flat = s->pixels == 1 && s->taps == (t->height + 2 * t->pad_y) * s->frame_x * t->channels;
        s->runs = s->frame_x == t->kernel_x ? 1 : t->kernel_y;
        s->run = s->taps / s->runs;
        s->wide = up(t->out, NR);
        s->at = at, at += s->wide * s->taps;
        s->bias_at = at, at += s->wide;
        s->spare = crew->rows * s->in_stride + NR;
        s->in = room, room += k ? s->spare : 2 * s->spare;
        s->grad = room, room += crew->rows * s->in_stride + NR;
        s->won = room, room += t->pool_y * t->pool_x > 1 ? crew->rows * t->last_y * t->last_x * s->wide : 0;
        if (k + 1 == job->stages) break;
        const Told *n = &s[1].t;
        const I frame = n->width + 2 * n->pad_x;
        if (n->channels == t->out) { /* maps, or numbers one after the other */
            s->to = (n->pad_y * frame + n->pad_x) * n->channels;
            s->to_y = frame * n->channels, s->to_x = n->channels, s->to_c = 1;
        } else { /* flattened, channel after channel */
            s->to = 0, s->to_y = t->last_x, s->to_x = 1, s->to_c = t->last_y * t->last_x;
        }
    }
    crew->packed = at, crew->room = room;
}

/* The whole of a job; 0, or what went wrong. */
int run(const Job *job) {
    Crew crew = {.job = job};
    crew.stages = calloc(job->stages + 1, sizeof(Stage)); /* one more: what would follow the last */
    if (!crew.stages) return NO_MEMORY;
    for (I k = 0; k < job->stages; k++)
        memcpy(&crew.stages[k].t, job->told + k * (I)(sizeof(Told) / sizeof(I)), sizeof(Told));
    laid(&crew);
    REAL *start = 0;
    if (!job->theta_stride) {
        if (!(start = borrowed(crew.packed))) {
            free(crew.stages);
            return NO_MEMORY;
        }
        pack(crew.stages, job->stages, job->theta, start);
    }
    crew.start = start;
    const I more = least(job->threads, job->clients) - 1;
    pthread_t threads[more > 0 ? more : 1];
    I begun = 0;
    while (begun < more && !pthread_create(&threads[begun], 0, work, &crew)) begun++;
    work(&crew); /* whoever could not be begun is not missed */
    for (I i = 0; i < begun; i++) pthread_join(threads[i], 0);
    brought_back(start), free(crew.stages);
    return (int)crew.trouble;
}
