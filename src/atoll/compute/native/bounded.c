/* The passes over updates in compute/bounded_rows.py: the same bits, for float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

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
