/* Gradient descent of many clients in one call, for stacks of convolutions and linear layers.

   One thread runs all steps of one client, writes the result and takes the next client. The client's weights therefore
   stay in the caches of one core. Each number is one chain of multiplications and additions in a fixed order, so its
   bits do not depend on the vector width, on the other clients or on the threads.

   A linear layer is treated as a convolution whose kernel covers the whole input. A layer here is a convolution with an
   optional bias, an optional ReLU and an optional max pool. ReLU and max pool commute.

       maps      [row][y][x][channel], with a frame of zeros if the next convolution pads
       weights   [panel][tap][NR]: NR adjacent output channels; a tap is (ky, kx, channel)

   `tile` computes all products: MR × NR sums at once, one factor is broadcast, the other is read as vectors. */

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
#define LOG1P log1p
#else
#define REAL float
#define LOG logf
#define LOG1P log1pf
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
#define TALL 24 /* rows of the tallest tile; its sums fill nearly all registers */
#else
#define NV 2
#define MR 6
#define TALL 6
#endif
#define NR (NV * VL)
#define MAX_ROWS 32           /* rows of one client in one pass */
#define CACHE_LINE 64         /* bytes */
#define CACHE_BYTES (1 << 23) /* larger results do not fit the caches */
#define PREFETCH_LINES 8      /* cache lines requested with each tile of products */
#define PACK_AHEAD 64         /* numbers of a row of weights that are prefetched before they are packed */
#define TRANSPOSE_RUN 128     /* taps transposed at once: a multiple of NR */

/* Load a vector into a register once. Otherwise the compiler reads memory again for each product, and a core can
   only make two reads a cycle. */
#ifdef __AVX__
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v) (void)(v)
#endif

/* STREAM stores a vector without reading its cache line first. STREAM_FENCE makes these stores visible to other
   threads. */
#if defined(__AVX512F__)
#define STREAM(p, v) _mm512_stream_si512((void *)(p), (__m512i)(v))
#define STREAM_FENCE _mm_sfence()
#elif defined(__AVX__)
#define STREAM(p, v) _mm256_stream_si256((void *)(p), (__m256i)(v))
#define STREAM_FENCE _mm_sfence()
#else
#define STREAM(p, v) store(p, v)
#define STREAM_FENCE
#endif

/* a − b · c with one rounding, as in torch, at every level of optimization. */
#if defined(__AVX512F__) && defined(WIDE)
#define SUBTRACT_PRODUCT(a, b, c) ((V)_mm512_fnmadd_pd((__m512d)(b), (__m512d)(c), (__m512d)(a)))
#elif defined(__AVX512F__)
#define SUBTRACT_PRODUCT(a, b, c) ((V)_mm512_fnmadd_ps((__m512)(b), (__m512)(c), (__m512)(a)))
#elif defined(__FMA__) && defined(WIDE)
#define SUBTRACT_PRODUCT(a, b, c) ((V)_mm256_fnmadd_pd((__m256d)(b), (__m256d)(c), (__m256d)(a)))
#elif defined(__FMA__)
#define SUBTRACT_PRODUCT(a, b, c) ((V)_mm256_fnmadd_ps((__m256)(b), (__m256)(c), (__m256)(a)))
#else
#define SUBTRACT_PRODUCT(a, b, c) ((a) - (b) * (c))
#endif

#define INLINE static inline __attribute__((always_inline))
#define up(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

typedef int64_t I;
typedef REAL V __attribute__((vector_size(BYTES)));

enum { DONE = 0, NO_MEMORY = 1, NO_CLASS = 2 };
#define IGNORED (-100) /* the label of a place that does not count */
enum { CROSS_ENTROPY = 0, SQUARED = 1, LOGISTIC = 2 };
enum { GRADIENT = 0, UPDATE = 1, MODEL = 2 };

/* Structs that Python fills. Each is declared as a list of fields, so that size, field count and field names are
   exported from the declaration itself. The loader compares them with the Python declaration. */
#define MEMBER(type, name) type name;
#define COUNT(type, name) +1
#define NAME(type, name) " " #name
#define SHARED_STRUCT(Struct, FIELDS)                                                                                 \
    typedef struct {                                                                                                  \
        FIELDS(MEMBER)                                                                                                \
    } Struct;                                                                                                         \
    const int64_t Struct##_size = sizeof(Struct), Struct##_count = FIELDS(COUNT);                                     \
    const char Struct##_fields[] = FIELDS(NAME);

#define LAYER_FIELDS(F)                                                                                               \
    F(I, relu)                                                                                                        \
    F(I, channels) F(I, height) F(I, width) /* of the input */                                                        \
    F(I, pad_y) F(I, pad_x)                                                                                           \
    F(I, out) F(I, kernel_y) F(I, kernel_x) F(I, stride_y) F(I, stride_x)                                             \
    F(I, out_y) F(I, out_x) /* before the pool */                                                                     \
    F(I, pool_y) F(I, pool_x) F(I, pool_stride_y) F(I, pool_stride_x) /* 1 × 1: no pool */                            \
    F(I, last_y) F(I, last_x) /* after the pool */                                                                    \
    F(I, weight) F(I, bias)   /* position in θ; bias −1: none */
SHARED_STRUCT(LayerSpec, LAYER_FIELDS)

#define JOB_FIELDS(F)                                                                                                 \
    F(const I *, layers) /* LayerSpec of each layer */                                                                \
    F(I, layer_count)                                                                                                 \
    F(I, loss)           /* CROSS_ENTROPY, SQUARED or LOGISTIC */                                                     \
    F(const REAL *, weights) /* of each class; 0: equal weights */                                                    \
    F(I, weight_count)                                                                                                \
    F(I, d)              /* numbers in θ */                                                                           \
    F(const void *, x)                                                                                                \
    F(I, bytes)          /* 1: x holds bytes, in units of 1/255 */                                                    \
    F(I, features)       /* numbers in a row of x */                                                                  \
    F(const void *, y)                                                                                                \
    F(I, targets)        /* numbers in a row of y */                                                                  \
    F(const I *, rows)   /* row numbers in x, of all clients in all steps; y is in this order already */              \
    F(const I *, offsets) /* of a step: first row */                                                                  \
    F(const I *, widths) F(const I *, lanes) /* of a step: rows of a client, clients */                               \
    F(const I *, counts) /* rows that count, of each client in each step */                                           \
    F(const I *, count_offsets) /* of a step: first count */                                                          \
    F(I, steps) F(I, clients) F(I, threads)                                                                           \
    F(const REAL *, theta)                                                                                            \
    F(I, theta_stride)   /* 0: all clients start from one θ */                                                        \
    F(I, result)         /* GRADIENT of one step, UPDATE θ − θ_k, or MODEL θ_k */                                     \
    F(I, pulls)          /* 1: a step has momentum, weight decay or a pull */                                         \
    F(double, lr) F(double, momentum) F(I, nesterov)                                                                  \
    F(double, kappa)     /* the factor of w in the pull */                                                            \
    F(const REAL *, constant) /* of the pull; 0: none */                                                              \
    F(I, constant_stride) /* 0: one constant for all clients */                                                       \
    F(const REAL *, offset) /* [client][d]: subtracted from the one constant of all clients; 0: none */               \
    F(const REAL *, anchor) /* [d]: mu · anchor is subtracted after the offset; 0: none */                            \
    F(double, mu)                                                                                                     \
    F(REAL *, velocity)  /* of each client before and after the steps; 0: it starts at 0 */                           \
    F(REAL *, out)                                                                                                    \
    F(REAL *, losses)    /* sum over the rows of a client in a step, in the order of the counts */                    \
    F(REAL *, peaks)     /* of a client: the largest |number| of each `block` of `out` */                             \
    F(I, block)
SHARED_STRUCT(Job, JOB_FIELDS)

/* A layer with the positions of its numbers in the buffers. */
typedef struct {
    LayerSpec spec;
    I frame_x;             /* width of the input with its frame */
    I in_stride;           /* numbers from one row's input to the next */
    I taps;                /* of one output: kernel_y · kernel_x · channels */
    I run, runs;           /* adjacent taps in the input, and the number of runs */
    I padded_out;          /* output channels, rounded up to whole panels */
    I pixels;              /* outputs of one row */
    int flat;              /* the kernel covers the input: all rows are one matrix product */
    I weights_at, bias_at; /* position in the packed weights */
    /* Position and strides of the output in the next layer's input. */
    I to, to_y, to_x, to_c;
    I in, grad, argmax;    /* positions in the buffers */
    I input_pitch;         /* from one table of the first layer's inputs to the other */
} Layer;

/* State that the threads of a job share. */
typedef struct {
    const Job *job;
    Layer *layers;
    I packed, room; /* numbers in the packed weights and in the buffers of all layers */
    I rows;         /* rows in the largest pass */
    const REAL *start, *constant, *anchor; /* packed, of all clients */
    _Atomic I next, status;
} JobThreads;

/* ---- vectors ---- */

INLINE V load(const REAL *p) {
    V v;
    memcpy(&v, p, BYTES);
    return v;
}

INLINE void store(REAL *p, V v) { memcpy(p, &v, BYTES); }

#ifdef WIDE
typedef int64_t Z;
typedef uint64_t U;
#define ABS_MASK INT64_MAX
#define MANTISSA_BITS 52
#define EXP_MIN -708 /* e^x is subnormal below it */
#define EXP_DEGREE 13
#else
typedef int32_t Z;
typedef uint32_t U;
#define ABS_MASK INT32_MAX
#define MANTISSA_BITS 23
#define EXP_MIN -87
#define EXP_DEGREE 7
#endif
typedef Z VZ __attribute__((vector_size(BYTES)));
typedef U VU __attribute__((vector_size(BYTES)));

INLINE V choose(VZ mask, V a, V b) { return (V)((mask & (VZ)a) | (~mask & (VZ)b)); }

/* n ≤ VL numbers at a distance of `step`; the remaining lanes are 0. VL numbers from p on are in the buffer. */
INLINE V gather(const REAL *p, I n, I step) {
    if (step == 1) {
        VZ lane;
        for (Z i = 0; i < VL; i++) lane[i] = i;
        return choose(lane < (Z)n, load(p), (V){0});
    }
    REAL part[BYTES / sizeof(REAL)] = {0};
    for (I i = 0; i < n; i++) part[i] = p[i * step];
    return load(part);
}

INLINE void scatter(REAL *p, I n, I step, V v) {
    if (n == VL && step == 1) {
        store(p, v);
        return;
    }
    REAL part[BYTES / sizeof(REAL)];
    store(part, v);
    for (I i = 0; i < n; i++) p[i * step] = part[i];
}

INLINE I smaller(I a, I b) { return a < b ? a : b; }

/* e^x = 2^n Σ r^i / i! for x ≤ 0 or NaN, with x = n ln 2 + r and |r| ≤ ln 2 / 2. Subnormal results become 0.

   Lanes below EXP_MIN overflow in the shift and in the addition and are discarded afterwards. Unsigned lanes wrap;
   in signed lanes the overflow would be undefined. */
INLINE V exponential(V x) {
    static const REAL inverse[] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                   1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const REAL ln2 = 0.693359375, rest = -2.1219444005469058e-4; /* ln2 has 9 bits, so n · ln2 is exact */
    const REAL anchor = (REAL)1.5 * ((Z)1 << MANTISSA_BITS);
    const V moved = x * (REAL)1.4426950408889634 + anchor;
    const V n = moved - anchor, r = (x - n * ln2) - n * rest;
    V sum = (V){0} + inverse[EXP_DEGREE];
#pragma GCC unroll 13
    for (int i = EXP_DEGREE - 1; i >= 0; i--) sum = inverse[i] + sum * r;
    const VU power = ((VU)moved - (VU)((V){0} + anchor)) << MANTISSA_BITS;
    return choose(x != x, x, choose(x < EXP_MIN, (V){0}, (V)((VU)sum + power)));
}

/* Positions of the factors of a tile: `runs` runs of `n` terms, with the strides between runs and between terms. */
typedef struct {
    I runs, n;
    I a_run, a_step, b_run, b_step;
} Terms;

/* Position of row m of a: it starts at a[m]; it starts at a[0] + m; or its terms are at a[term] + a_run + m. */
enum { ROW_POINTERS = 0, ADJACENT_ROWS = 1, STRIDED_TERMS = 2 };

/* s = Σ a[m][…] · b[…] for m rows and NR columns. */
INLINE void tile(const int mr, const int layout, const REAL *const *a, const REAL *b, const Terms t, V (*s)[NV]) {
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) s[m][v] = (V){0};
    for (I i = 0; i < t.runs; i++) {
        const REAL *p = b + i * t.b_run;
        I at = layout == STRIDED_TERMS ? t.a_run : i * t.a_run;
        for (I r = 0; r < t.n; r++, p += t.b_step, at += t.a_step) {
            const REAL *own = layout == STRIDED_TERMS ? a[r] + at : a[0] + at;
            V read[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                read[v] = load(p + v * VL);
                KEEP_IN_REGISTER(read[v]);
            }
#pragma GCC unroll 24
            for (int m = 0; m < mr; m++) {
                const REAL x = layout == ROW_POINTERS ? a[m][at] : own[m];
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

/* One case for each number of rows, because sums stay in registers only if their number is constant. */
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

/* Rows of the next tile if n remain: MR, and the last two tiles get equal heights. A low tile stalls on its sums. */
INLINE I tile_height(I n) { return n >= 2 * MR ? MR : n > MR ? (n + 1) / 2 : n; }

/* dst[j][i] = src[i][j], 8 × 8. */
INLINE void transpose8(const REAL *src, I from, REAL *dst, I to) {
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

/* dst[j][i] = src[i][j], NR × NR. */
static void transpose_square(const REAL *src, I from, REAL *dst, I to) {
    for (I i = 0; i < NR; i += 8)
        for (I j = 0; j < NR; j += 8) transpose8(src + i * from + j, from, dst + j * to + i, to);
}

/* ---- θ in the order of torch, and packed ---- */

/* The constant of one client's pull, shift − offset − mu · anchor, from its packed offset. */
typedef struct {
    const REAL *shift, *anchor; /* packed; 0: none */
    REAL mu;
} Pull;

/* Replace n packed numbers of the offset, whole vectors from position `at` on, by the constant. */
INLINE void subtract_offset(const Pull *pull, REAL *packed, I at, I n) {
    for (const I end = at + n; at < end; at += VL) {
        V c = pull->shift ? load(pull->shift + at) - load(packed + at) : -load(packed + at);
        if (pull->anchor) c = SUBTRACT_PRODUCT(c, (V){0} + pull->mu, load(pull->anchor + at));
        store(packed + at, c);
    }
}

/* Pack θ, or the offset of a pull as the constant of the pull. */
static void pack(const Layer *s, I count, const REAL *theta, REAL *packed, const Pull *pull) {
    for (I k = 0; k < count; k++, s++) {
        const LayerSpec *t = &s->spec;
        const I area = t->kernel_y * t->kernel_x;
        REAL *w = packed + s->weights_at;
        for (I p = 0; p < s->padded_out / NR; p++) {
            const I outs = smaller(NR, t->out - p * NR), at = s->weights_at + p * s->taps * NR;
            const REAL *from = theta + t->weight + p * NR * s->taps;
            REAL *to = w + p * s->taps * NR;
            I first = 0;
            if (outs < NR) memset(to, 0, sizeof(REAL) * s->taps * NR);
            for (; area == 1 && outs == NR && first + NR <= s->taps; first += NR) {
                const I ahead = first + PACK_AHEAD, next = ahead < s->taps ? ahead : ahead + (NR - 1) * s->taps;
                for (I o = 0; o < NR; o++) __builtin_prefetch(from + o * s->taps + next); /* also of the next panel */
                transpose_square(from + first, s->taps, to + first * NR, NR);
                if (pull) subtract_offset(pull, packed, at + first * NR, NR * NR);
            }
            for (I o = 0; o < outs; o++)
                for (I c = first; c < t->channels; c++)
                    for (I i = 0; i < area; i++) to[(i * t->channels + c) * NR + o] = from[o * s->taps + c * area + i];
            if (pull) subtract_offset(pull, packed, at + first * NR, (s->taps - first) * NR);
        }
        memset(packed + s->bias_at, 0, sizeof(REAL) * s->padded_out);
        if (t->bias >= 0) memcpy(packed + s->bias_at, theta + t->bias, sizeof(REAL) * t->out);
        if (t->bias >= 0 && pull) subtract_offset(pull, packed, s->bias_at, s->padded_out);
    }
}

/* The place of one client's result. */
typedef struct {
    const REAL *theta; /* the result is theta − number; 0: the number itself */
    REAL *to;
    U *peaks; /* the largest |number| of each block, as bits: in their order NaN is above all numbers */
    I block;
    int streams; /* the result does not fit the caches, so stores need not read it first */
} Destination;

INLINE U larger_bits(U most, REAL x) {
    U bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= ABS_MASK;
    return bits > most ? bits : most;
}

/* Write n numbers from position `at` on, and raise the peaks of their blocks. */
INLINE void write_out(const Destination *out, I at, const REAL *now, I n) {
    for (I end; n; at += end, now += end, n -= end) {
        REAL *restrict to = out->to + at;
        const REAL *theta = out->theta ? out->theta + at : 0;
        const I block = at / out->block;
        end = smaller(n, (block + 1) * out->block - at);
        U most = out->peaks[block];
        I i = 0;
        if (out->streams && end > 2 * VL) {
            for (; (uintptr_t)(to + i) % BYTES; i++)
                to[i] = theta ? theta[i] - now[i] : now[i], most = larger_bits(most, to[i]);
            VZ top = {0};
            for (; i + VL <= end; i += VL) {
                const V x = theta ? load(theta + i) - load(now + i) : load(now + i);
                const VZ bits = (VZ)x & (Z)ABS_MASK;
                top = (VZ)choose(bits > top, (V)bits, (V)top);
                STREAM(to + i, x);
            }
            for (I j = 0; j < VL; j++) most = (U)top[j] > most ? (U)top[j] : most;
        }
        for (; i < end; i++) to[i] = theta ? theta[i] - now[i] : now[i], most = larger_bits(most, to[i]);
        out->peaks[block] = most;
    }
}

static void unpack(const Layer *s, I count, const REAL *packed, const Destination *out) {
    for (I k = 0; k < count; k++, s++) {
        const LayerSpec *t = &s->spec;
        const I area = t->kernel_y * t->kernel_x, taps = s->taps;
        const REAL *w = packed + s->weights_at;
        for (I p = 0; p < s->padded_out / NR; p++) {
            const I outs = smaller(NR, t->out - p * NR);
            const REAL *panel = w + p * taps * NR;
            REAL block[NR * TRANSPOSE_RUN];
            if (area == 1) {
                for (I r = 0; r < taps; r += TRANSPOSE_RUN) {
                    const I n = smaller(TRANSPOSE_RUN, taps - r);
                    I i = 0;
                    for (; i + NR <= n; i += NR)
                        transpose_square(panel + (r + i) * NR, NR, block + i, TRANSPOSE_RUN);
                    for (; i < n; i++)
                        for (I o = 0; o < outs; o++) block[o * TRANSPOSE_RUN + i] = panel[(r + i) * NR + o];
                    for (I o = 0; o < outs; o++)
                        write_out(out, t->weight + (p * NR + o) * taps + r, block + o * TRANSPOSE_RUN, n);
                }
                continue;
            }
            for (I o = 0; o < outs; o++)
                for (I c = 0; c < t->channels; c++)
                    for (I i = 0; i < area; i += TRANSPOSE_RUN) {
                        const I n = smaller(TRANSPOSE_RUN, area - i);
                        for (I j = 0; j < n; j++) block[j] = panel[((i + j) * t->channels + c) * NR + o];
                        write_out(out, t->weight + ((p * NR + o) * t->channels + c) * area + i, block, n);
                    }
        }
        if (t->bias >= 0) write_out(out, t->bias, packed + s->bias_at, t->out);
    }
}

/* Weights with input and output exchanged: [run][panel of taps][output][NR]. */
static void transpose(const Layer *s, const REAL *w, REAL *transposed) {
    const I taps = up(s->run, NR);
    for (I i = 0; i < s->runs; i++)
        for (I r = 0; r < taps; r += NR)
            for (I p = 0; p < s->padded_out / NR; p++) {
                REAL *to = transposed + ((i * taps + r) * s->padded_out) + p * NR * NR;
                const REAL *from = w + (p * s->taps + i * s->run + r) * NR;
                if (r + NR <= s->run) {
                    transpose_square(from, NR, to, NR);
                    continue;
                }
                for (I o = 0; o < NR; o++)
                    for (I j = 0; j < NR; j++) to[o * NR + j] = r + j < s->run ? from[j * NR + o] : 0;
            }
}

/* ---- a layer, forward ---- */

/* An output pixel of a layer: row, y, x, and the start of its kernel in the row's input. */
typedef struct {
    I row, y, x, at;
} Position;

INLINE Position next_position(const Layer *s, Position p) {
    const LayerSpec *t = &s->spec;
    p.at += t->stride_x * t->channels;
    if (++p.x < t->out_x) return p;
    p.x = 0;
    if (++p.y == t->out_y) p.y = 0, p.row++;
    p.at = p.y * t->stride_y * s->frame_x * t->channels;
    return p;
}

INLINE void output_tile(const int mr, const REAL *const *a, const REAL *b, const Terms t, const REAL *bias, REAL *out,
                        I padded_out) {
    V c[MR][NV];
    tile(mr, ROW_POINTERS, a, b, t, c);
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(out + m * padded_out + v * VL, c[m][v] + load(bias + v * VL));
}

/* One panel of the outputs of some rows, [pixel][padded_out]. */
static void forward_panel(const Layer *s, I p, const REAL *const *in, I rows, const REAL *w, const REAL *bias,
                          REAL *out) {
    const I n = rows * s->pixels;
    const REAL *panel = w + p * s->taps * NR;
    const Terms t = {s->runs, s->run, s->frame_x * s->spec.channels, 1, s->run * NR, NR};
    Position at = {0};
    for (I q = 0, mr; q < n; q += mr) {
        mr = tile_height(n - q);
        const REAL *a[MR];
        for (I m = 0; m < mr; m++, at = next_position(s, at)) a[m] = in[at.row] + at.at;
#define CALL(mr) output_tile(mr, a, panel, t, bias + p * NR, out + q * s->padded_out + p * NR, s->padded_out)
        CASES(mr, CALL)
#undef CALL
    }
}

/* Pool and ReLU of one row, written into the next layer's input. The index of the largest neighbour is stored in
   `argmax`. NaN counts as the largest. */
static void pool_relu_forward(const Layer *s, const REAL *from, REAL *to, REAL *argmax) {
    const LayerSpec *t = &s->spec;
    const int pools = t->pool_y * t->pool_x > 1;
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const REAL *first = from + (y * t->pool_stride_y * t->out_x + x * t->pool_stride_x) * s->padded_out;
            REAL *at = to + s->to + y * s->to_y + x * s->to_x;
            for (I c = 0; c < t->out; c += VL) {
                V best = load(first + c), which = {0};
                for (I j = 0; j < t->pool_y; j++)
                    for (I i = !j; i < t->pool_x; i++) {
                        const V other = load(first + (j * t->out_x + i) * s->padded_out + c);
                        const VZ more = (other > best) | (other != other);
                        best = choose(more, other, best);
                        which = choose(more, (V){0} + (REAL)(j * t->pool_x + i), which);
                    }
                if (pools) store(argmax + (y * t->last_x + x) * s->padded_out + c, which);
                if (t->relu) best = choose((best > 0) | (best != best), best, (V){0});
                scatter(at + c * s->to_c, smaller(VL, t->out - c), s->to_c, best);
            }
        }
}

/* ---- a layer, backward ---- */

/* The gradient of one row's outputs before pool and ReLU, [pixel][padded_out]. */
static void pool_relu_backward(const Layer *s, const REAL *grad, const REAL *act, const REAL *argmax, REAL *dy) {
    const LayerSpec *t = &s->spec;
    const int disjoint = t->pool_stride_y >= t->pool_y && t->pool_stride_x >= t->pool_x; /* pools share no neighbour */
    const int all =
        disjoint && t->last_y * t->pool_y * t->last_x * t->pool_x == s->pixels && s->padded_out - t->out < VL;
    if (!all) memset(dy, 0, sizeof(REAL) * s->pixels * s->padded_out);
    for (I y = 0; y < t->last_y; y++)
        for (I x = 0; x < t->last_x; x++) {
            const I at = s->to + y * s->to_y + x * s->to_x;
            REAL *first = dy + (y * t->pool_stride_y * t->out_x + x * t->pool_stride_x) * s->padded_out;
            for (I c = 0; c < t->out; c += VL) {
                const I n = smaller(VL, t->out - c);
                V g = gather(grad + at + c * s->to_c, n, s->to_c);
                if (t->relu) g = choose(gather(act + at + c * s->to_c, n, s->to_c) > 0, g, (V){0});
                if (t->pool_y * t->pool_x == 1) {
                    store(first + c, g);
                    continue;
                }
                const V which = load(argmax + (y * t->last_x + x) * s->padded_out + c);
                for (I j = 0; j < t->pool_y; j++)
                    for (I i = 0; i < t->pool_x; i++) {
                        REAL *into = first + (j * t->out_x + i) * s->padded_out + c;
                        const V mine = choose(which == (V){0} + (REAL)(j * t->pool_x + i), g, (V){0});
                        store(into, disjoint ? mine : load(into) + mine);
                    }
            }
        }
}

INLINE void input_tile(const int mr, const REAL *const *a, const REAL *b, const Terms t, REAL *const *to, int adds) {
    V c[MR][NV];
    tile(mr, ROW_POINTERS, a, b, t, c);
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++) /* one after the other, because adjacent kernels overlap */
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(to[m] + v * VL, adds ? load(to[m] + v * VL) + c[m][v] : c[m][v]);
}

/* The gradient of some rows' inputs. A linear layer writes it; a convolution, of one row, adds the overlapping kernels.
   Its outputs are taken column by column: two outputs of one column add to different lines of the input, so that no sum
   waits for the one before. Each number is added in the same order as line by line. */
static void input_gradient(const Layer *s, const REAL *dy, I rows, const REAL *transposed, REAL *grad) {
    const LayerSpec *t = &s->spec;
    const I taps = up(s->run, NR), n = rows * s->pixels, line = s->frame_x * t->channels;
    const Terms terms = {1, t->out, 0, 1, 0, NR};
    for (I i = 0; i < s->runs; i++)
        for (I r = 0; r < taps; r += NR) {
            const REAL *panel = transposed + (i * taps + r) * s->padded_out;
            REAL *first = grad + i * line + r;
            I y = 0, x = 0;
            for (I q = 0, mr; q < n; q += mr) {
                mr = tile_height(n - q);
                const REAL *a[MR];
                REAL *to[MR];
                for (I m = 0; m < mr; m++) {
                    a[m] = dy + (s->flat ? q + m : y * t->out_x + x) * s->padded_out;
                    to[m] = first + (s->flat ? (q + m) * s->in_stride : y * t->stride_y * line + x * t->stride_x * t->channels);
                    if (++y == t->out_y) y = 0, x++;
                }
#define CALL(mr) input_tile(mr, a, panel, terms, to, !s->flat)
                CASES(mr, CALL)
#undef CALL
            }
        }
}

/* A step with momentum β, weight decay or a pull: v ← βv + g + κw + c; w ← w − lr·v, or w ← w − lr·(g + κw + c + βv)
   with Nesterov's momentum. The arrays are packed like the weights. */
typedef struct {
    REAL lr, momentum, kappa;
    int nesterov;
    const REAL *constant; /* c; 0: none */
    REAL *velocity;       /* 0: without momentum */
} Rule;

/* The weights w at position `at` after a step with the gradient g. */
INLINE V stepped(const Rule *r, I at, V w, V g) {
    g += r->kappa * w;
    if (r->constant) g += load(r->constant + at);
    if (!r->velocity) return w - r->lr * g;
    const V v = r->momentum * load(r->velocity + at) + g;
    store(r->velocity + at, v);
    return w - r->lr * (r->nesterov ? g + r->momentum * v : v);
}

/* Rows of the data that are prefetched during the work on other rows. */
typedef struct {
    const char *data;
    const I *rows;
    I n, size, at;
} Prefetch;

/* Memory of one thread, for one client at a time. */
typedef struct {
    REAL *w, *g;                /* packed weights and their gradient */
    REAL *transposed, *outputs; /* of the current layer */
    REAL *room;                 /* buffers of all layers */
    REAL *constant, *velocity;  /* packed, of the current client; 0: the rule has none */
    const Rule *rule;           /* of the steps; 0: plain gradient descent */
    /* The step of a first linear layer is applied with the next batch, so that each panel is read once for both. */
    I pending_rows; /* rows of the batch of this step; 0: no step is pending */
    I table;        /* index of the table that holds the rows of the current batch */
    const REAL *rows_in[2][MAX_ROWS];
    REAL *pending_dy;
    int fresh; /* the first layer's weights are still those of the start; its first step copies them here */
    Prefetch prefetch;
} Scratch;

/* Prefetch n cache lines. A core has few requests in flight, so a large n at once would stall it. */
INLINE void prefetch_lines(Prefetch *c, I n) {
    for (; c->n && n; n--) {
        __builtin_prefetch(c->data + *c->rows * c->size + c->at);
        c->at += CACHE_LINE;
        if (c->at >= c->size) c->at = 0, c->rows++, c->n--;
    }
}

INLINE void weight_tile(const int mr, const int layout, const REAL *const *a, const REAL *b, const Terms t, REAL factor,
                        const REAL *from, REAL *to, const Rule *rule, I place) {
    V c[TALL][NV];
    tile(mr, layout, a, b, t, c);
    if (rule) {
        const Rule r = *rule; /* a copy, which no store can change */
#pragma GCC unroll 24
        for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                const I at = m * NR + v * VL;
                store(to + at, stepped(&r, place + at, load(from + at), c[m][v]));
            }
        return;
    }
    REAL f = factor;
    __asm__("" : "+m"(f)); /* reload it here: the sums occupy all registers */
#pragma GCC unroll 24
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            const I at = m * NR + v * VL;
            store(to + at, (from ? load(from + at) : (V){0}) + f * c[m][v]);
        }
}

/* Destination of one layer's weights and biases, and the numbers that are added; from = 0: none. With a rule, `from`
   and `to` are weights, and the rule makes the step. */
typedef struct {
    const REAL *from, *bias_from;
    REAL *to, *bias_to;
    const Rule *rule;
} Sink;

/* One panel of to ← from + factor · gradient of the weights, over some rows; dy [pixel][padded_out]. */
static void weight_gradient(const Layer *s, I p, const REAL *const *in, const REAL *dy, I rows, REAL factor, Sink sink,
                            Prefetch *prefetch) {
    const LayerSpec *t = &s->spec;
    const I line = s->frame_x * t->channels, runs = s->flat ? 1 : t->out_y, n = s->flat ? rows : t->out_x;
    Terms terms = {runs, n, t->stride_y * line, s->flat ? 0 : t->stride_x * t->channels, n * s->padded_out,
                   s->padded_out};
    const REAL *b = dy + p * NR;
    const REAL *from = sink.from ? sink.from + p * s->taps * NR : 0;
    REAL *to = sink.to + p * s->taps * NR;
    I place = s->weights_at + p * s->taps * NR; /* of `to` in the packed weights */
    for (I i = 0; i < s->runs; i++)
        for (I q = 0, mr; q < s->run; q += mr) {
            const I left = s->run - q;
            mr = TALL > MR && left >= TALL ? TALL : tile_height(left);
            const REAL *a = in[0] + i * line + q;
            if (s->flat) terms.a_run = q;
#define CALL(mr) s->flat ? weight_tile(mr, STRIDED_TERMS, in, b, terms, factor, from, to, sink.rule, place)            \
                         : weight_tile(mr, ADJACENT_ROWS, &a, b, terms, factor, from, to, 0, 0)
            if (mr > MR) CALL(TALL);
            else CASES(mr, CALL)
#undef CALL
            to += mr * NR, place += mr * NR;
            if (from) from += mr * NR; /* 0 + 0 is undefined in C */
            if (prefetch) prefetch_lines(prefetch, PREFETCH_LINES);
        }
    for (I v = p * NR; t->bias >= 0 && v < (p + 1) * NR; v += VL) {
        V c = {0};
        for (I q = 0; q < runs * n; q++) c += load(dy + q * s->padded_out + v);
        if (sink.rule)
            store(sink.bias_to + v, stepped(sink.rule, s->bias_at + v, load(sink.bias_from + v), c));
        else
            store(sink.bias_to + v, sink.from ? load(sink.bias_from + v) + factor * c : factor * c);
    }
}

/* ---- the loss ---- */

/* −log softmax(z)[y] of a row. z becomes share · gradient; entries after the last class are undefined. */
static REAL cross_entropy(REAL *z, I classes, I y, REAL share) {
    REAL top = z[0], sum = 0;
    for (I c = 1; c < classes; c++) top = z[c] > top || z[c] != z[c] ? z[c] : top;
    const REAL logit = z[y] - top;
    for (I c = 0; c < classes; c += VL) store(z + c, exponential(load(z + c) - top));
    for (I c = 0; c < classes; c++) sum += z[c];
    for (I c = 0; c < classes; c += VL) store(z + c, load(z + c) / sum * share);
    z[y] -= share;
    return LOG(sum) - logit;
}

/* The mean of (z − y)² over a row's targets. z becomes share · gradient. */
static REAL squared_error(REAL *z, I targets, const REAL *y, REAL share) {
    REAL sum = 0;
    for (I c = 0; c < targets; c++) {
        const REAL off = z[c] - y[c];
        sum += off * off;
        z[c] = off * (2 * share / targets);
    }
    return sum / targets;
}

/* The mean of −log σ(±z) over a row's labels y, 0 or 1. z becomes share · gradient; entries after the last label are
   undefined. */
static REAL logistic(REAL *z, I labels, const REAL *y, REAL share) {
    REAL sum = 0, part[BYTES / sizeof(REAL)];
    I labelled = 0;
    for (I c = 0; c < labels; c++) labelled += y[c] != IGNORED;
    for (I first = 0; first < labels; first += VL) {
        const V v = load(z + first);
        store(part, exponential(choose(v < 0, v, -v)));
        for (I c = first; c < smaller(labels, first + VL); c++) {
            if (y[c] == IGNORED) {
                z[c] = 0;
                continue;
            }
            const REAL e = part[c - first], one = 1 + e;
            sum += (z[c] > 0 ? z[c] : 0) - z[c] * y[c] + LOG1P(e);
            z[c] = ((z[c] < 0 ? e : 1) / one - y[c]) * (share / labelled);
        }
    }
    return sum / labelled;
}

/* Add the loss of a row to *loss. z becomes share · gradient. */
static I row_loss(const Job *job, REAL *z, I outputs, const REAL *y, const I *class, REAL share, REAL *loss) {
    if (job->loss == SQUARED) {
        *loss += squared_error(z, job->targets, y, share);
        return DONE;
    }
    const I label = job->loss == LOGISTIC ? (job->weights ? (I)y[0] : 0) : *class;
    const I count = job->weights ? job->weight_count : outputs;
    if (label < 0 || label >= count || (job->loss == CROSS_ENTROPY && label >= outputs)) return NO_CLASS;
    const REAL weight = job->weights ? job->weights[label] : 1;
    *loss += job->loss == LOGISTIC ? weight * logistic(z, job->targets, y, share * weight)
                                   : weight * cross_entropy(z, outputs, label, share * weight);
    return DONE;
}

/* ---- a step ---- */

/* A step of the packed weights from position `at` up to `end`, which are whole vectors. */
static void descend(REAL *restrict w, const REAL *restrict g, REAL lr, const Rule *rule, I at, I end) {
    if (!rule)
        for (; at < end; at++) w[at] -= lr * g[at];
    else
        for (; at < end; at += VL) store(w + at, stepped(rule, at, load(w + at), load(g + at)));
}

INLINE const REAL *current_weights(const JobThreads *shared, const Scratch *scratch) {
    return scratch->fresh ? shared->start : scratch->w;
}

/* Apply the pending step to one panel. */
static void apply_pending(const JobThreads *shared, Scratch *scratch, I p) {
    const Layer *s = shared->layers;
    const REAL *from = current_weights(shared, scratch);
    const Sink sink = {from + s->weights_at, from + s->bias_at, scratch->w + s->weights_at, scratch->w + s->bias_at,
                       scratch->rule};
    if (scratch->pending_rows)
        weight_gradient(s, p, scratch->rows_in[!scratch->table], scratch->pending_dy, scratch->pending_rows,
                        -(REAL)shared->job->lr, sink, &scratch->prefetch);
}

/* Copy n numbers of the data to positions at a distance of `step`. */
INLINE void read_values(const Job *job, I at, I n, REAL *to, I step) {
    if (job->bytes) {
        const uint8_t *from = (const uint8_t *)job->x + at;
        for (I i = 0; i < n; i++) to[i * step] = (REAL)((float)from[i] / 255.0f);
    } else {
        const REAL *from = (const REAL *)job->x + at;
        for (I i = 0; i < n; i++) to[i * step] = from[i];
    }
}

/* A row of the data: a pointer into the data if the layer can read it there, otherwise a copy in `to`. */
static const REAL *read_row(const Job *job, const Layer *s, I row, REAL *to) {
    const LayerSpec *t = &s->spec;
    const I area = t->height * t->width, whole = s->frame_x == t->width && (t->channels == 1 || area == 1);
    if (whole && !t->pad_y) {
        if (!job->bytes) return (const REAL *)job->x + row * job->features;
        read_values(job, row * job->features, job->features, to, 1);
        return to;
    }
    for (I c = 0; c < t->channels; c++)
        for (I y = 0; y < t->height; y++)
            read_values(job, row * job->features + c * area + y * t->width, t->width,
                        to + ((y + t->pad_y) * s->frame_x + t->pad_x) * t->channels + c, t->channels);
    return to;
}

/* Forward and backward pass on n ≤ MAX_ROWS rows. It adds the gradient to g, and overwrites g if `first`. If `steps`,
   these rows are the whole batch, and the step is made at once. */
static I forward_backward(const JobThreads *shared, Scratch *scratch, const I *rows, const REAL *y, const I *classes,
                          I n, REAL share, int first, int steps, REAL *loss) {
    const Job *job = shared->job;
    const REAL lr = (REAL)job->lr;
    const I count = job->layer_count;
    const Layer *s = shared->layers;
    REAL *room = scratch->room;
    const REAL *rows_in[MAX_ROWS], **first_rows = scratch->rows_in[scratch->table];
    for (I b = 0; b < n; b++)
        first_rows[b] = read_row(job, s, rows[b], room + s->in + scratch->table * s->input_pitch + b * s->in_stride);
    for (I k = 0; k < count; k++, s++) {
        const REAL **in = k ? rows_in : first_rows;
        const I panels = s->padded_out / NR;
        for (I b = 0; k && b < n; b++) rows_in[b] = room + s->in + b * s->in_stride;
        if (s->flat) {
            for (I p = 0; p < panels; p++) {
                if (!k) apply_pending(shared, scratch, p);
                const REAL *w = k || scratch->pending_rows ? scratch->w : current_weights(shared, scratch);
                forward_panel(s, p, in, n, w + s->weights_at, w + s->bias_at, scratch->outputs);
            }
            if (!k) scratch->fresh = scratch->fresh && !scratch->pending_rows;
            for (I b = 0; k < count - 1 && b < n; b++)
                pool_relu_forward(s, scratch->outputs + b * s->padded_out, room + s[1].in + b * s[1].in_stride, 0);
            continue;
        }
        const I kept = s->spec.last_y * s->spec.last_x * s->padded_out;
        for (I b = 0; b < n; b++) {
            for (I p = 0; p < panels; p++)
                forward_panel(s, p, in + b, 1, scratch->w + s->weights_at, scratch->w + s->bias_at, scratch->outputs);
            pool_relu_forward(s, scratch->outputs, room + s[1].in + b * s[1].in_stride, room + s->argmax + b * kept);
        }
    }
    const Layer *top = --s;
    const I class_count = top->spec.out;
    REAL *dy = scratch->outputs;
    for (I b = 0; b < n; b++) {
        REAL *z = dy + b * top->padded_out;
        if (row_loss(job, z, class_count, y + b * job->targets, classes + b, share, loss)) return NO_CLASS;
        memset(z + class_count, 0, sizeof(REAL) * (top->padded_out - class_count));
    }
    scratch->pending_rows = 0;
    for (I k = count - 1; k >= 0; k--, s--) {
        const REAL **in = k ? rows_in : first_rows, *next = room + s[1].grad, *act = room + s[1].in;
        REAL *grad = k ? room + s->grad : 0, *g = scratch->g + s->weights_at, *gb = scratch->g + s->bias_at;
        REAL *w = scratch->w + s->weights_at, *wb = scratch->w + s->bias_at;
        const I panels = s->padded_out / NR;
        for (I b = 0; k && b < n; b++) rows_in[b] = room + s->in + b * s->in_stride;
        if (k) transpose(s, w, scratch->transposed);
        if (s->flat) {
            REAL *own = k ? dy : scratch->pending_dy;
            for (I b = 0; b < n; b++)
                if (k < count - 1)
                    pool_relu_backward(s, next + b * s[1].in_stride, act + b * s[1].in_stride, 0,
                                       own + b * s->padded_out);
                else if (!k)
                    memcpy(own + b * s->padded_out, dy + b * s->padded_out, sizeof(REAL) * s->padded_out);
            if (k) input_gradient(s, own, n, scratch->transposed, grad);
            if (steps && !k) {
                scratch->pending_rows = n, scratch->table = !scratch->table;
                continue;
            }
            const Sink sink = steps ? (Sink){w, wb, w, wb, scratch->rule} : (Sink){first ? 0 : g, gb, g, gb, 0};
            for (I p = 0; p < panels; p++) weight_gradient(s, p, in, own, n, steps ? -lr : 1, sink, 0);
            continue;
        }
        const I kept = s->spec.last_y * s->spec.last_x * s->padded_out;
        for (I b = 0; b < n; b++) {
            pool_relu_backward(s, next + b * s[1].in_stride, act + b * s[1].in_stride, room + s->argmax + b * kept,
                               dy);
            if (k) {
                memset(grad + b * s->in_stride, 0, sizeof(REAL) * s->in_stride);
                input_gradient(s, dy, 1, scratch->transposed, grad + b * s->in_stride);
            }
            const Sink sink = {first && b == 0 ? 0 : g, gb, g, gb, 0};
            for (I p = 0; p < panels; p++) weight_gradient(s, p, in + b, dy, 1, 1, sink, 0);
        }
        if (steps) descend(scratch->w, scratch->g, lr, scratch->rule, s->weights_at, s->bias_at + s->padded_out);
    }
    return DONE;
}

/* Apply the pending step to all panels, so that scratch->w holds all weights. */
static void flush(const JobThreads *shared, Scratch *scratch) {
    const Layer *s = shared->layers;
    const REAL *from = current_weights(shared, scratch);
    for (I p = 0; p < s->padded_out / NR; p++) apply_pending(shared, scratch, p);
    if (!scratch->pending_rows && scratch->fresh) memcpy(scratch->w, from, sizeof(REAL) * (s->bias_at + s->padded_out));
    scratch->pending_rows = scratch->fresh = 0;
}

/* The first rows of client k in step i; none if the client does not make this step. */
static Prefetch rows_to_prefetch(const Job *job, I k, I i) {
    Prefetch c = {.data = job->x, .size = job->features * (job->bytes ? 1 : (I)sizeof(REAL))};
    if (k < job->clients && i < job->steps && k < job->lanes[i]) {
        c.rows = job->rows + job->offsets[i] + k * job->widths[i];
        c.n = smaller(job->counts[job->count_offsets[i] + k], MAX_ROWS);
    }
    return c;
}

/* The rule of a client's steps, with its constant and its velocity packed. */
static Rule client_rule(const JobThreads *shared, const Scratch *scratch, I k) {
    const Job *job = shared->job;
    REAL *velocity = scratch->velocity;
    const REAL *constant = shared->constant;
    if (job->constant_stride) {
        pack(shared->layers, job->layer_count, job->constant + k * job->constant_stride, scratch->constant, 0);
        constant = scratch->constant;
    } else if (job->offset) {
        const Pull pull = {shared->constant, shared->anchor, (REAL)job->mu};
        pack(shared->layers, job->layer_count, job->offset + k * job->d, scratch->constant, &pull);
        constant = scratch->constant;
    }
    if (job->velocity)
        pack(shared->layers, job->layer_count, job->velocity + k * job->d, velocity, 0);
    else if (velocity)
        memset(velocity, 0, sizeof(REAL) * shared->packed);
    return (Rule){(REAL)job->lr, (REAL)job->momentum, (REAL)job->kappa, (int)job->nesterov, constant, velocity};
}

/* All steps of one client, or its gradient. The next client is taken before the last step, whose work hides the
   prefetch of the next client's first rows. */
static I run_client(JobThreads *shared, Scratch *scratch, I k, I *next) {
    const Job *job = shared->job;
    const Rule rule = client_rule(shared, scratch, k);
    scratch->rule = job->pulls ? &rule : 0;
    const int descends = job->result != GRADIENT;
    const Layer *s = shared->layers;
    const I copied = s->flat ? s->bias_at + s->padded_out : 0; /* the first layer follows in its first step */
    scratch->fresh = !job->theta_stride && s->flat;
    if (job->theta_stride)
        pack(s, job->layer_count, job->theta + k * job->theta_stride, scratch->w, 0);
    else
        memcpy(scratch->w + copied, shared->start + copied, sizeof(REAL) * (shared->packed - copied));
    for (I i = 0; i < job->steps && k < job->lanes[i]; i++) {
        const I at = job->offsets[i] + k * job->widths[i], n = job->counts[job->count_offsets[i] + k];
        REAL *loss = job->losses + job->count_offsets[i] + k;
        *loss = 0;
        const int ends = i + 1 == job->steps || k >= job->lanes[i + 1];
        if (ends) *next = atomic_fetch_add(&shared->next, 1);
        scratch->prefetch = ends ? rows_to_prefetch(job, *next, 0) : rows_to_prefetch(job, k, i + 1);
        if (!scratch->pending_rows) prefetch_lines(&scratch->prefetch, INT64_MAX); /* no pending step can do it */
        const I parts = (n + MAX_ROWS - 1) / MAX_ROWS; /* their sizes differ by at most 1 */
        if (parts > 1) flush(shared, scratch);
        if (!n && !descends) memset(scratch->g, 0, sizeof(REAL) * shared->packed);
        for (I p = 0, q = 0; p < parts; p++) {
            const I end = n * (p + 1) / parts;
            const I got = forward_backward(shared, scratch, job->rows + at + q,
                                           (const REAL *)job->y + (at + q) * job->targets, (const I *)job->y + at + q,
                                           end - q, (REAL)1 / n, p == 0, descends && parts == 1, loss);
            if (got) return got;
            q = end;
        }
        if (descends && parts > 1) descend(scratch->w, scratch->g, (REAL)job->lr, scratch->rule, 0, shared->packed);
    }
    if (descends) flush(shared, scratch);
    const I blocks = (job->d + job->block - 1) / job->block;
    const Destination out = {.theta = job->result == UPDATE ? job->theta + k * job->theta_stride : 0,
                             .to = job->out + k * job->d,
                             .peaks = (U *)(job->peaks + k * blocks),
                             .block = job->block,
                             .streams = job->clients * job->d * (I)sizeof(REAL) > CACHE_BYTES};
    memset(out.peaks, 0, sizeof(U) * blocks);
    unpack(s, job->layer_count, descends ? scratch->w : scratch->g, &out);
    if (job->velocity) {
        U unused = 0;
        const Destination back = {.to = job->velocity + k * job->d, .peaks = &unused, .block = INT64_MAX};
        unpack(s, job->layer_count, scratch->velocity, &back);
    }
    return DONE;
}

/* ---- threads ---- */

/* Buffers are kept from one job to the next. The kernel clears new pages on first use, which can take as long as a
   job. The capacity of a buffer stands in the cache line before its numbers. */
#define FREE_LIST_SIZE 64
static _Atomic(I *) free_list[FREE_LIST_SIZE];

/* n numbers, or 0 if memory is exhausted. */
static REAL *buffer_acquire(I n) {
    for (int i = 0; i < FREE_LIST_SIZE; i++) {
        I *found = atomic_exchange(free_list + i, 0);
        if (found && *found >= n) return (REAL *)((char *)found + CACHE_LINE);
        free(found);
    }
    I *made = aligned_alloc(CACHE_LINE, CACHE_LINE + up(n * (I)sizeof(REAL), CACHE_LINE));
    if (!made) return 0;
    *made = n;
    return (REAL *)((char *)made + CACHE_LINE);
}

static void buffer_release(REAL *numbers) {
    if (!numbers) return;
    I *own = (I *)((char *)numbers - CACHE_LINE);
    for (int i = 0; i < FREE_LIST_SIZE; i++) {
        I *empty = 0;
        if (atomic_compare_exchange_strong(free_list + i, &empty, own)) return;
    }
    free(own);
}

static void *thread_main(void *argument) {
    JobThreads *shared = argument;
    I transposed = 0, outputs = 0;
    for (const Layer *s = shared->layers; s < shared->layers + shared->job->layer_count; s++) {
        const I t = s->runs * up(s->run, NR) * s->padded_out, o = (s->flat ? shared->rows : s->pixels) * s->padded_out;
        transposed = t > transposed ? t : transposed;
        outputs = o > outputs ? o : outputs;
    }
    const I unit = CACHE_LINE / sizeof(REAL), packed = up(shared->packed, unit);
    const I dy = up(shared->rows * shared->layers->padded_out, unit);
    transposed = up(transposed, unit), outputs = up(outputs, unit);
    const I constant = shared->job->constant_stride || shared->job->offset ? packed : 0;
    const I velocity = shared->job->momentum ? packed : 0;
    REAL *all = buffer_acquire(2 * packed + transposed + outputs + dy + constant + velocity + shared->room);
    if (!all) {
        atomic_store(&shared->status, NO_MEMORY);
        return 0;
    }
    Scratch scratch = {.w = all, .g = all + packed, .transposed = all + 2 * packed};
    scratch.outputs = scratch.transposed + transposed, scratch.pending_dy = scratch.outputs + outputs;
    scratch.constant = scratch.pending_dy + dy, scratch.velocity = scratch.constant + constant;
    scratch.room = scratch.velocity + velocity;
    if (!velocity) scratch.velocity = 0;
    memset(scratch.g, 0, sizeof(REAL) * shared->packed);  /* padding stays zero */
    memset(scratch.room, 0, sizeof(REAL) * shared->room); /* and so do the frames */
    I next = 0;
    const I clients = shared->job->clients;
    for (I k = atomic_fetch_add(&shared->next, 1); k < clients && !atomic_load(&shared->status); k = next) {
        const I got = run_client(shared, &scratch, k, &next);
        if (got) atomic_store(&shared->status, got);
    }
    buffer_release(all);
    STREAM_FENCE;
    return 0;
}

/* Positions of all weights and buffers. */
static void plan_buffers(JobThreads *shared) {
    const Job *job = shared->job;
    I at = 0, room = 0;
    for (I i = 0; i < job->steps; i++) shared->rows = shared->rows > job->widths[i] ? shared->rows : job->widths[i];
    shared->rows = smaller(shared->rows, MAX_ROWS);
    for (I k = 0; k < job->layer_count; k++) {
        Layer *s = shared->layers + k;
        const LayerSpec *t = &s->spec;
        s->frame_x = t->width + 2 * t->pad_x;
        s->in_stride = up((t->height + 2 * t->pad_y) * s->frame_x * t->channels, NR);
        s->taps = t->kernel_y * t->kernel_x * t->channels;
        s->pixels = t->out_y * t->out_x;
        s->flat = s->pixels == 1 && s->taps == (t->height + 2 * t->pad_y) * s->frame_x * t->channels;
        s->runs = s->frame_x == t->kernel_x ? 1 : t->kernel_y;
        s->run = s->taps / s->runs;
        s->padded_out = up(t->out, NR);
        s->weights_at = at, at += s->padded_out * s->taps;
        s->bias_at = at, at += s->padded_out;
        s->input_pitch = shared->rows * s->in_stride + NR;
        s->in = room, room += k ? s->input_pitch : 2 * s->input_pitch;
        s->grad = room, room += shared->rows * s->in_stride + NR;
        s->argmax = room, room += t->pool_y * t->pool_x > 1 ? shared->rows * t->last_y * t->last_x * s->padded_out : 0;
        if (k + 1 == job->layer_count) break;
        const LayerSpec *n = &s[1].spec;
        const I frame = n->width + 2 * n->pad_x;
        if (n->channels == t->out) { /* maps, or adjacent numbers */
            s->to = (n->pad_y * frame + n->pad_x) * n->channels;
            s->to_y = frame * n->channels, s->to_x = n->channels, s->to_c = 1;
        } else { /* flattened, one channel after the other */
            s->to = 0, s->to_y = t->last_x, s->to_x = 1, s->to_c = t->last_y * t->last_x;
        }
    }
    shared->packed = at, shared->room = room;
}

/* Free the buffers that no job uses. */
void release_buffers(void) {
    for (int i = 0; i < FREE_LIST_SIZE; i++) free(atomic_exchange(free_list + i, 0));
}

/* The packed numbers of a vector that all clients share, or 0 if memory is exhausted. */
static REAL *packed_copy(const JobThreads *shared, const REAL *vector) {
    REAL *packed = buffer_acquire(shared->packed);
    if (packed) pack(shared->layers, shared->job->layer_count, vector, packed, 0);
    return packed;
}

/* Run a job: DONE, NO_MEMORY or NO_CLASS. After NO_MEMORY or NO_CLASS the outputs are undefined. */
int run(const Job *job) {
    JobThreads shared = {.job = job};
    const I more = smaller(job->threads, job->clients) - 1;
    pthread_t *threads = more > 0 ? calloc(more, sizeof(pthread_t)) : 0;
    shared.layers = calloc(job->layer_count + 1, sizeof(Layer)); /* forward_backward reads one layer after the last */
    REAL *start = 0, *constant = 0, *anchor = 0;
    if (!shared.layers || (more > 0 && !threads)) {
        shared.status = NO_MEMORY;
        goto end;
    }
    for (I k = 0; k < job->layer_count; k++)
        memcpy(&shared.layers[k].spec, job->layers + k * LayerSpec_count, sizeof(LayerSpec));
    plan_buffers(&shared);
    const int constants = job->constant && !job->constant_stride;
    if ((!job->theta_stride && !(start = packed_copy(&shared, job->theta))) ||
        (constants && !(constant = packed_copy(&shared, job->constant))) ||
        (job->anchor && !(anchor = packed_copy(&shared, job->anchor)))) {
        shared.status = NO_MEMORY;
        goto end;
    }
    shared.start = start, shared.constant = constant, shared.anchor = anchor;
    I started = 0;
    while (started < more && !pthread_create(&threads[started], 0, thread_main, &shared)) started++;
    thread_main(&shared); /* if a thread cannot be created, the others run its clients */
    for (I i = 0; i < started; i++) pthread_join(threads[i], 0);
end:
    buffer_release(start), buffer_release(constant), buffer_release(anchor), free(shared.layers), free(threads);
    return (int)shared.status;
}
