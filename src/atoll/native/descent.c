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

#ifdef WIDE
#define REAL double
#define EXP exp
#define LOG log
#else
#define REAL float
#define EXP expf
#define LOG logf
#endif

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define VL ((int64_t)(BYTES / sizeof(REAL)))
#define NR (2 * VL)
#define MR 6
#define ROWS 32  /* of one client, worked on at once */
#define TURN 128 /* numbers of a weight's row that are turned at once: a multiple of NR */

/* Read once into a register, not once for every product: two reads a product is all that a core has. */
#ifdef __x86_64__
#define HELD(v) __asm__("" : "+x"(v))
#else
#define HELD(v) (void)(v)
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

INLINE I least(I a, I b) { return a < b ? a : b; }

/* Σ over `runs` runs of `n` terms of a[m][…] · b[…], for m rows and NR columns. */
INLINE void tile(const int mr, const REAL *const *a, I a_run, I a_step, const REAL *b, I b_run, I b_step, I runs, I n,
                 V c[MR][2]) {
    V s[MR][2];
#pragma GCC unroll 6
    for (int m = 0; m < mr; m++) s[m][0] = s[m][1] = (V){0};
    for (I i = 0; i < runs; i++) {
        const REAL *p = b + i * b_run;
        I at = i * a_run;
        for (I r = 0; r < n; r++, p += b_step, at += a_step) {
            V b0 = load(p), b1 = load(p + VL);
            HELD(b0);
            HELD(b1);
#pragma GCC unroll 6
            for (int m = 0; m < mr; m++) {
                const REAL x = a[m][at];
                s[m][0] += x * b0;
                s[m][1] += x * b1;
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < mr; m++) c[m][0] = s[m][0], c[m][1] = s[m][1];
}

/* The same for any number of rows up to MR: a case each, so that the sums stay in registers. */
static __attribute__((noinline)) void tiles(I mr, const REAL *const *a, I a_run, I a_step, const REAL *b, I b_run, I b_step, I runs, I n,
                  V c[MR][2]) {
    switch (mr) {
    case 6: tile(6, a, a_run, a_step, b, b_run, b_step, runs, n, c); break;
    case 5: tile(5, a, a_run, a_step, b, b_run, b_step, runs, n, c); break;
    case 4: tile(4, a, a_run, a_step, b, b_run, b_step, runs, n, c); break;
    case 3: tile(3, a, a_run, a_step, b, b_run, b_step, runs, n, c); break;
    case 2: tile(2, a, a_run, a_step, b, b_run, b_step, runs, n, c); break;
    default: tile(1, a, a_run, a_step, b, b_run, b_step, runs, n, c);
    }
}

/* n in parts as equal as can be, of at most MR: the end of part i. */
INLINE I part(I n, I parts, I i) { return n * (i + 1) / parts; }

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
        for (I o = 0; o < t->out; o++) {
            const REAL *from = theta + t->weight + o * s->taps;
            REAL *to = w + o / NR * s->taps * NR + o % NR;
            for (I i = 0; i < area; i++)
                for (I c = 0; c < t->channels; c++) to[(i * t->channels + c) * NR] = from[c * area + i];
        }
        memset(packed + s->bias_at, 0, sizeof(REAL) * s->wide);
        if (t->bias >= 0) memcpy(packed + s->bias_at, theta + t->bias, sizeof(REAL) * t->out);
    }
}

/* out = θ − packed, or packed alone where there is no θ. */
static void unpack(const Stage *s, I stages, const REAL *packed, const REAL *theta, REAL *out) {
    for (I k = 0; k < stages; k++, s++) {
        const Told *t = &s->t;
        const I area = t->kernel_y * t->kernel_x, taps = s->taps;
        const REAL *w = packed + s->at;
        for (I p = 0; p < s->wide / NR; p++) {
            const I outs = least(NR, t->out - p * NR);
            const REAL *panel = w + p * taps * NR;
            if (area == 1) {
                REAL block[NR * TURN];
                for (I r = 0; r < taps; r += TURN) {
                    const I n = least(TURN, taps - r);
                    I i = 0;
                    for (; i + NR <= n; i += NR) flip(panel + (r + i) * NR, NR, block + i, TURN);
                    for (; i < n; i++)
                        for (I o = 0; o < outs; o++) block[o * TURN + i] = panel[(r + i) * NR + o];
                    for (I o = 0; o < outs; o++) {
                        const I at = t->weight + (p * NR + o) * taps + r;
                        if (theta)
                            for (i = 0; i < n; i++) out[at + i] = theta[at + i] - block[o * TURN + i];
                        else
                            memcpy(out + at, block + o * TURN, sizeof(REAL) * n);
                    }
                }
                continue;
            }
            for (I o = 0; o < outs; o++)
                for (I c = 0; c < t->channels; c++)
                    for (I i = 0; i < area; i++) {
                        const I at = t->weight + ((p * NR + o) * t->channels + c) * area + i;
                        const REAL now = panel[(i * t->channels + c) * NR + o];
                        out[at] = theta ? theta[at] - now : now;
                    }
        }
        if (t->bias >= 0)
            for (I o = 0; o < t->out; o++) {
                const REAL now = packed[s->bias_at + o];
                out[t->bias + o] = theta ? theta[t->bias + o] - now : now;
            }
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

/* Outputs of some rows that stand side by side, [pixel][wide]. */
static void forward(const Stage *s, const REAL *in, I rows, const REAL *w, const REAL *bias, REAL *out) {
    const Told *t = &s->t;
    const I n = rows * s->pixels, parts = (n + MR - 1) / MR;
    for (I p = 0; p < s->wide / NR; p++) {
        const REAL *panel = w + p * s->taps * NR;
        const V b0 = load(bias + p * NR), b1 = load(bias + p * NR + VL);
        for (I i = 0, q = 0; i < parts; i++) {
            const I end = part(n, parts, i), mr = end - q;
            const REAL *a[MR];
            V c[MR][2];
            for (I m = 0; m < mr; m++) {
                const I row = (q + m) / s->pixels, pixel = (q + m) % s->pixels;
                const I y = pixel / t->out_x * t->stride_y, x = pixel % t->out_x * t->stride_x;
                a[m] = in + row * s->in_stride + (y * s->frame_x + x) * t->channels;
            }
            tiles(mr, a, s->frame_x * t->channels, 1, panel, s->run * NR, NR, s->runs, s->run, c);
            for (I m = 0; m < mr; m++) {
                store(out + (q + m) * s->wide + p * NR, c[m][0] + b0);
                store(out + (q + m) * s->wide + p * NR + VL, c[m][1] + b1);
            }
            q = end;
        }
    }
}

/* Pool and ReLU of one row, into the next stage's input; which neighbour won is kept. */
static void passed(const Stage *s, const REAL *restrict from, REAL *restrict to, REAL *restrict won) {
    const Told *t = &s->t;
    const REAL floor = t->relu ? 0 : -INFINITY;
    const int pools = t->pool_y * t->pool_x > 1;
    REAL best[t->out], which[t->out];
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const REAL *first = from + (y * t->hop_y * t->out_x + x * t->hop_x) * s->wide;
            REAL *at = to + s->to + y * s->to_y + x * s->to_x;
            if (!pools) {
                for (I c = 0; c < t->out; c++) best[c] = first[c] > floor || first[c] != first[c] ? first[c] : floor;
            } else {
                for (I c = 0; c < t->out; c++) best[c] = first[c], which[c] = 0;
                for (I j = 0; j < t->pool_y; j++)
                    for (I i = !j; i < t->pool_x; i++) {
                        const REAL *next = first + (j * t->out_x + i) * s->wide, number = j * t->pool_x + i;
                        for (I c = 0; c < t->out; c++) {
                            const int more = next[c] > best[c] || next[c] != next[c];
                            best[c] = more ? next[c] : best[c];
                            which[c] = more ? number : which[c];
                        }
                    }
                memcpy(won + (y * t->last_x + x) * s->wide, which, sizeof which);
                for (I c = 0; c < t->out; c++) best[c] = best[c] > floor || best[c] != best[c] ? best[c] : floor;
            }
            if (s->to_c == 1)
                memcpy(at, best, sizeof best);
            else
                for (I c = 0; c < t->out; c++) at[c * s->to_c] = best[c];
        }
}

/* ---- a stage backward ---- */

/* The gradient of one row's outputs before pool and ReLU, [pixel][wide]. */
static void returned(const Stage *s, const REAL *restrict grad, const REAL *restrict act, const REAL *restrict won,
                     REAL *restrict dy) {
    const Told *t = &s->t;
    const int pools = t->pool_y * t->pool_x > 1;
    const int whole = t->hop_y == t->pool_y && t->hop_x == t->pool_x;
    REAL g[t->out];
    if (pools || s->wide > t->out || t->last_y * t->last_x < s->pixels) memset(dy, 0, sizeof(REAL) * s->pixels * s->wide);
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const I at = s->to + y * s->to_y + x * s->to_x;
            if (t->relu)
                for (I c = 0; c < t->out; c++) g[c] = act[at + c * s->to_c] > 0 ? grad[at + c * s->to_c] : 0;
            else
                for (I c = 0; c < t->out; c++) g[c] = grad[at + c * s->to_c];
            REAL *first = dy + (y * t->hop_y * t->out_x + x * t->hop_x) * s->wide;
            if (!pools) {
                memcpy(first, g, sizeof g);
                continue;
            }
            const REAL *which = won + (y * t->last_x + x) * s->wide;
            for (I j = 0; j < t->pool_y; j++)
                for (I i = 0; i < t->pool_x; i++) {
                    REAL *into = first + (j * t->out_x + i) * s->wide, number = j * t->pool_x + i;
                    if (whole)
                        for (I c = 0; c < t->out; c++) into[c] = which[c] == number ? g[c] : 0;
                    else
                        for (I c = 0; c < t->out; c++) into[c] += which[c] == number ? g[c] : 0;
                }
        }
}

/* The gradient of some rows' inputs: of a linear layer it is written, of a convolution added up. */
static void to_input(const Stage *s, const REAL *dy, I rows, const REAL *turned, REAL *grad) {
    const Told *t = &s->t;
    const I taps = up(s->run, NR);
    const I lines = s->flat ? rows : t->out_y; /* what a tile goes through: its places never meet */
    const I a_line = s->flat ? s->wide : t->out_x * s->wide;
    const I parts = (lines + MR - 1) / MR, columns = s->flat ? 1 : t->out_x;
    for (I i = 0; i < s->runs; i++)
        for (I r = 0; r < taps; r += NR) {
            const REAL *panel = turned + (i * taps + r) * s->wide;
            for (I x = 0; x < columns; x++)
                for (I k = 0, q = 0; k < parts; k++) {
                    const I end = part(lines, parts, k), mr = end - q;
                    const REAL *a[MR];
                    V c[MR][2];
                    for (I m = 0; m < mr; m++) a[m] = dy + (q + m) * a_line + x * s->wide;
                    tiles(mr, a, 0, 1, panel, 0, NR, 1, t->out, c);
                    for (I m = 0; m < mr; m++) {
                        if (s->flat) {
                            REAL *to = grad + (q + m) * s->in_stride + r;
                            store(to, c[m][0]);
                            store(to + VL, c[m][1]);
                            continue;
                        }
                        const I y = (q + m) * t->stride_y + i;
                        REAL *to = grad + (y * s->frame_x + x * t->stride_x) * t->channels + r;
                        store(to, load(to) + c[m][0]);
                        store(to + VL, load(to + VL) + c[m][1]);
                    }
                    q = end;
                }
        }
}

/* sink ← keep · sink + factor · gradient of the weights, from some rows; dy [pixel][wide]. */
static void to_weights(const Stage *s, const REAL *in, const REAL *dy, I rows, REAL keep, REAL factor, REAL *sink,
                       REAL *bias) {
    const Told *t = &s->t;
    const int flat = s->flat;
    const I runs = flat ? 1 : t->out_y, n = flat ? rows : t->out_x;
    const I a_run = t->stride_y * s->frame_x * t->channels, a_step = flat ? s->in_stride : t->stride_x * t->channels;
    const I parts = (s->run + MR - 1) / MR;
    for (I p = 0; p < s->wide / NR; p++) {
        const REAL *b = dy + p * NR;
        REAL *panel = sink + p * s->taps * NR;
        for (I i = 0; i < s->runs; i++)
            for (I k = 0, q = 0; k < parts; k++) {
                const I end = part(s->run, parts, k), mr = end - q;
                const REAL *a[MR];
                V c[MR][2];
                for (I m = 0; m < mr; m++) a[m] = in + i * s->frame_x * t->channels + q + m;
                tiles(mr, a, a_run, a_step, b, n * s->wide, s->wide, runs, n, c);
                REAL *to = panel + (i * s->run + q) * NR;
                if (keep == 0)
                    for (I m = 0; m < mr; m++, to += NR) {
                        store(to, factor * c[m][0]);
                        store(to + VL, factor * c[m][1]);
                    }
                else
                    for (I m = 0; m < mr; m++, to += NR) {
                        store(to, load(to) + factor * c[m][0]);
                        store(to + VL, load(to + VL) + factor * c[m][1]);
                    }
                q = end;
            }
        if (t->bias < 0) continue;
        for (I v = 0; v < NR; v += VL) {
            V c = {0};
            for (I q = 0; q < runs * n; q++) c += load(b + q * s->wide + v);
            c *= factor;
            store(bias + p * NR + v, keep == 0 ? c : load(bias + p * NR + v) + c);
        }
    }
}

/* ---- the loss ---- */

/* −log softmax(z)[y] of a row, and share · its gradient in place. */
static REAL entropy(REAL *z, I classes, I y, REAL share) {
    REAL top = z[0], sum = 0;
    for (I c = 1; c < classes; c++) top = z[c] > top || z[c] != z[c] ? z[c] : top;
    const REAL given = z[y] - top;
    for (I c = 0; c < classes; c++) {
        z[c] = EXP(z[c] - top);
        sum += z[c];
    }
    for (I c = 0; c < classes; c++) z[c] = z[c] / sum * share;
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

typedef struct {
    REAL *w, *g, *turned, *flat, *room; /* packed weights, their gradient, scratch, buffers of all stages */
} Bench;

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

static void read_row(const Job *job, const Stage *s, I row, REAL *to) {
    const Told *t = &s->t;
    const I area = t->height * t->width, whole = s->frame_x == t->width && (t->channels == 1 || area == 1);
    if (whole && !t->pad_y) {
        read_line(job, row * job->features, job->features, to, 1);
        return;
    }
    for (I c = 0; c < t->channels; c++)
        for (I y = 0; y < t->height; y++)
            read_line(job, row * job->features + c * area + y * t->width, t->width,
                      to + ((y + t->pad_y) * s->frame_x + t->pad_x) * t->channels + c, t->channels);
}

/* Forward and back on n rows of at most ROWS: the gradient into g, or where they are the whole step, the step. */
static I pass(const Crew *crew, Bench *bench, const I *rows, const REAL *y, const I *classes, I n, REAL share,
              int first, int steps, REAL *loss) {
    const Job *job = crew->job;
    const REAL lr = (REAL)job->lr;
    const I stages = job->stages;
    const Stage *s = crew->stages;
    REAL *room = bench->room;
    for (I b = 0; b < n; b++) read_row(job, s, rows[b], room + s->in + b * s->in_stride);
    for (I k = 0; k < stages; k++, s++) {
        const REAL *in = room + s->in, *w = bench->w + s->at, *bias = bench->w + s->bias_at;
        if (k == stages - 1 || s->flat) {
            forward(s, in, n, w, bias, bench->flat);
            for (I b = 0; k < stages - 1 && b < n; b++)
                passed(s, bench->flat + b * s->wide, room + s[1].in + b * s[1].in_stride, 0);
            continue;
        }
        const I kept = s->t.last_y * s->t.last_x * s->wide;
        for (I b = 0; b < n; b++) {
            forward(s, in + b * s->in_stride, 1, w, bias, bench->flat);
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
    for (I k = stages - 1; k >= 0; k--, s--) {
        const REAL *in = room + s->in, *next = room + s[1].grad, *act = room + s[1].in;
        REAL *grad = k ? room + s->grad : 0, *g = bench->g + s->at, *gb = bench->g + s->bias_at;
        if (k) turn(s, bench->w + s->at, bench->turned);
        if (s->flat) {
            if (k < stages - 1)
                for (I b = 0; b < n; b++)
                    returned(s, next + b * s[1].in_stride, act + b * s[1].in_stride, 0, dy + b * s->wide);
            if (k) to_input(s, dy, n, bench->turned, grad);
            if (steps)
                to_weights(s, in, dy, n, 1, -lr, bench->w + s->at, bench->w + s->bias_at);
            else
                to_weights(s, in, dy, n, !first, 1, g, gb);
            continue;
        }
        const I kept = s->t.last_y * s->t.last_x * s->wide;
        for (I b = 0; b < n; b++) {
            if (k < stages - 1)
                returned(s, next + b * s[1].in_stride, act + b * s[1].in_stride, room + s->won + b * kept, dy);
            if (k) {
                memset(grad + b * s->in_stride, 0, sizeof(REAL) * s->in_stride);
                to_input(s, dy, 1, bench->turned, grad + b * s->in_stride);
            }
            to_weights(s, in + b * s->in_stride, dy, 1, !(first && b == 0), 1, g, gb);
        }
        if (steps) down(bench->w + s->at, g, lr, s->bias_at + s->wide - s->at);
    }
    return DONE;
}

/* All steps of one client, or its gradient. */
static I client(const Crew *crew, Bench *bench, I k) {
    const Job *job = crew->job;
    const int descends = job->asked != GRADIENT;
    if (job->theta_stride)
        pack(crew->stages, job->stages, job->theta + k * job->theta_stride, bench->w);
    else
        memcpy(bench->w, crew->start, sizeof(REAL) * crew->packed);
    for (I i = 0; i < job->steps && k < job->lanes[i]; i++) {
        const I at = job->offsets[i] + k * job->widths[i], n = job->counts[job->count_offsets[i] + k];
        REAL *loss = job->losses + job->count_offsets[i] + k;
        *loss = 0;
        const I parts = (n + ROWS - 1) / ROWS;
        if (!n && !descends) memset(bench->g, 0, sizeof(REAL) * crew->packed);
        for (I p = 0, q = 0; p < parts; p++) {
            const I end = part(n, parts, p);
            const I got = pass(crew, bench, job->rows + at + q, (const REAL *)job->y + (at + q) * job->targets,
                               (const I *)job->y + at + q, end - q, (REAL)1 / n, p == 0, descends && parts == 1, loss);
            if (got) return got;
            q = end;
        }
        if (descends && parts > 1) down(bench->w, bench->g, (REAL)job->lr, crew->packed);
    }
    unpack(crew->stages, job->stages, descends ? bench->w : bench->g,
           job->asked == UPDATE ? job->theta + k * job->theta_stride : 0, job->out + k * job->d);
    return DONE;
}

/* ---- threads ---- */

static REAL *numbers(I n) {
    void *p = aligned_alloc(64, up(n * (I)sizeof(REAL), 64));
    return p;
}

static void *work(void *given) {
    Crew *crew = given;
    I turned = 0, flat = 0;
    for (const Stage *s = crew->stages; s < crew->stages + crew->job->stages; s++) {
        const I t = s->runs * up(s->run, NR) * s->wide, f = (s->flat ? crew->rows : s->pixels) * s->wide;
        turned = t > turned ? t : turned;
        flat = f > flat ? f : flat;
    }
    Bench bench = {numbers(crew->packed), numbers(crew->packed), numbers(turned), numbers(flat), numbers(crew->room)};
    if (bench.w && bench.g && bench.turned && bench.flat && bench.room) {
        memset(bench.g, 0, sizeof(REAL) * crew->packed);  /* what no parameter stands for stays zero */
        memset(bench.room, 0, sizeof(REAL) * crew->room); /* and so do frames */
        for (I k; !atomic_load(&crew->trouble) && (k = atomic_fetch_add(&crew->next, 1)) < crew->job->clients;) {
            const I got = client(crew, &bench, k);
            if (got) atomic_store(&crew->trouble, got);
        }
    } else
        atomic_store(&crew->trouble, NO_MEMORY);
    free(bench.w), free(bench.g), free(bench.turned), free(bench.flat), free(bench.room);
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
        s->in = room, room += crew->rows * s->in_stride + NR;
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
        if (!(start = numbers(crew.packed))) {
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
    free(start), free(crew.stages);
    return (int)crew.trouble;
}
