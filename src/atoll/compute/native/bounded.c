/* The passes over updates in compute/bounded_rows.py: the same bits, for float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define BLOCK 4096 /* numbers of a block of peaks, and of a block of squares */
#define LANES 256  /* partial sums of a block of squares */
#define INFINITE 0x7f800000u

static inline uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* sums[b] = Σ x² over the block b of a row. x² of a float is exact in double, so an FMA changes nothing. */
void squares(const float *row, int64_t d, double *sums) {
    for (int64_t start = 0; start < d; start += BLOCK) {
        double lanes[LANES] = {0};
        const int64_t end = start + BLOCK < d ? start + BLOCK : d, whole = start + (end - start) / LANES * LANES;
        for (int64_t i = start; i < whole; i += LANES)
            for (int64_t j = 0; j < LANES; j++)
                lanes[j] += (double)row[i + j] * row[i + j];
        for (int64_t j = 0; j < end - whole; j++)
            lanes[j] += (double)row[whole + j] * row[whole + j];
        for (int64_t half = LANES / 2; half; half /= 2)
            for (int64_t j = 0; j < half; j++)
                lanes[j] += lanes[half + j];
        sums[start / BLOCK] = lanes[0];
    }
}

/* out = factor · row, and the largest magnitude of each block: NaN if one is NaN. */
void scale(const float *row, int64_t d, float factor, float *out, float *peaks) {
    for (int64_t start = 0; start < d; start += BLOCK) {
        const int64_t end = start + BLOCK < d ? start + BLOCK : d;
        uint32_t peak = 0;
        for (int64_t i = start; i < end; i++) {
            const float x = row[i] * factor;
            const uint32_t bits = magnitude(x);
            peak = bits > peak ? bits : peak;
            out[i] = x;
        }
        memcpy(peaks + start / BLOCK, &peak, sizeof peak);
    }
}

/* Eight numbers, which need not be aligned. STREAM stores them without reading their cache line first. FUSED and
   FUSED_ONE round a · b + c once, as torch does, at every level of optimization. */
#define WIDTH 8
typedef float V __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Z __attribute__((vector_size(32), aligned(4), may_alias));
#ifdef __AVX__
#define STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#define STREAM_FENCE _mm_sfence()
#else
#define STREAM(p, v) (*(V *)(p) = (v))
#define STREAM_FENCE
#endif

#ifdef __FMA__
#define FUSED(a, b, c) ((V)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FUSED_ONE(a, b, c) fmaf(a, b, c)
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#define FUSED_ONE(a, b, c) ((a) * (b) + (c))
#endif

enum { QUOTIENT, SUM, SUM_AND_NEXT };

/* Numbers from `start` to `end` of one row: out = row / factor or factor · row + base, and next = own + out. The largest
   magnitude goes to *peak: NaN if one is NaN. */
static inline __attribute__((always_inline)) void combine_block(const int kind, const float *row, float factor,
                                                                const float *base, const float *own, float *out,
                                                                float *next, int64_t start, int64_t end, float *peak) {
    uint32_t most = 0;
    Z top = {0};
    const V factors = (V){0} + factor;
    const int aligned = kind != SUM_AND_NEXT || !(((uintptr_t)out ^ (uintptr_t)next) % sizeof(V));
    int64_t i = start;
    while (i < end) {
        if ((uintptr_t)(out + i) % sizeof(V) || i + WIDTH > end) {
            const float x = kind == QUOTIENT ? row[i] / factor : FUSED_ONE(row[i], factor, base[i]);
            const uint32_t bits = magnitude(x);
            most = bits > most ? bits : most;
            out[i] = x;
            if (kind == SUM_AND_NEXT) next[i] = own[i] + x;
            i++;
            continue;
        }
        for (; i + WIDTH <= end; i += WIDTH) {
            const V u = *(const V *)(row + i);
            V x = u / factors;
            if (kind != QUOTIENT) x = FUSED(u, factors, *(const V *)(base + i));
            const Z bits = (Z)x & 0x7fffffff, more = bits > top;
            top = (bits & more) | (top & ~more);
            STREAM(out + i, x);
            if (kind != SUM_AND_NEXT) continue;
            const V y = *(const V *)(own + i) + x;
            if (aligned) STREAM(next + i, y);
            else *(V *)(next + i) = y;
        }
    }
    for (int j = 0; j < WIDTH; j++) most = (uint32_t)top[j] > most ? (uint32_t)top[j] : most;
    memcpy(peak, &most, sizeof most);
}

static inline __attribute__((always_inline)) void combine_rows(const int kind, const float *rows, int64_t clients,
                                                               int64_t d, const float *factors, const float *base,
                                                               int64_t base_stride, const float *own, float *out,
                                                               float *next, float *peaks) {
    for (int64_t k = 0; k < clients; k++) {
        for (int64_t start = 0; start < d; start += BLOCK)
            combine_block(kind, rows, factors[k], base, own, out, next, start, start + BLOCK < d ? start + BLOCK : d,
                          peaks++);
        rows += d, out += d;
        if (kind != QUOTIENT) base += base_stride;
        if (kind == SUM_AND_NEXT) own += d, next += d;
    }
    STREAM_FENCE;
}

/* out = row / factor for each client, and the largest magnitude of each block. */
void quotients(const float *rows, int64_t clients, int64_t d, const float *factors, float *out, float *peaks) {
    combine_rows(QUOTIENT, rows, clients, d, factors, 0, 0, 0, out, 0, peaks);
}

/* out = factor · row + base for each client, and the largest magnitude of each block. If there is a `next`, it is
   own + out. The stride of a base that all clients share is 0. */
void combine(const float *rows, int64_t clients, int64_t d, const float *factors, const float *base,
             int64_t base_stride, const float *own, float *out, float *next, float *peaks) {
    if (next) combine_rows(SUM_AND_NEXT, rows, clients, d, factors, base, base_stride, own, out, next, peaks);
    else combine_rows(SUM, rows, clients, d, factors, base, base_stride, 0, out, 0, peaks);
}

/* mix64 in base/random.py */
static inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* The number (j + ½) / 2¹⁶ − ½ for a 16-bit j, added to x before it is rounded and cut. */
static inline float on_grid(float x, float up, float down, float limit, int16_t draw) {
    const float y = rintf(x * up + ((float)draw + 0.5f) * 0x1p-16f);
    return (y > limit ? limit : y < -limit ? -limit : y) * down;
}

/* out = the row rounded to multiples of `down`, at random by the words of `state`, and cut to ±limit · down. All numbers
   are NaN if one of them is not finite in steps of the grid. `up` is a power of two, so an FMA changes nothing. */
void round_row(const float *row, int64_t d, uint64_t state, float up, float down, float limit, float *out,
               float *peaks) {
    const uint64_t step = 0x9E3779B97F4A7C15u;
    uint32_t largest = 0;
    for (int64_t start = 0; start < d; start += BLOCK) {
        const int64_t end = start + BLOCK < d ? start + BLOCK : d;
        uint64_t words[BLOCK / 4];
        int16_t draws[BLOCK];
        for (int64_t i = 0; i < BLOCK / 4; i++)
            words[i] = mix(state + (uint64_t)(start / 4 + i + 1) * step);
        memcpy(draws, words, sizeof draws);
        uint32_t peak = 0;
        for (int64_t i = start; i < end; i++) {
            const uint32_t given = magnitude(row[i] * up);
            largest = given > largest ? given : largest;
            const float x = on_grid(row[i], up, down, limit, draws[i - start]);
            const uint32_t bits = magnitude(x);
            peak = bits > peak ? bits : peak;
            out[i] = x;
        }
        memcpy(peaks + start / BLOCK, &peak, sizeof peak);
    }
    for (int64_t i = 0; largest >= INFINITE && i < d; i++)
        out[i] = peaks[i / BLOCK] = NAN;
}
