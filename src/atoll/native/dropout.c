/* The mask of intercept.py's keyed dropout: the same bits, in one pass. Built for float, and for double (WIDE).

   Element i is kept where the upper 24 bits of a scrambled word are at least p · 2²⁴. The scrambling is SplitMix64's,
   without its last shift (rng.py: mix64, stir64). */

#include <stdint.h>

#ifdef WIDE
#define REAL double
#else
#define REAL float
#endif

/* Upper bits of a scrambled word: what the last shift would change is not among them. */
static inline uint64_t stirred(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    return (x ^ x >> 27) * 0x94D049BB133111EBu;
}

/* mask[i] = kept where element i is kept, else 0; `least` is p · 2²⁴, a whole number. */
void keep(uint64_t word, int64_t n, uint64_t least, double kept, REAL *mask) {
    const uint64_t last = stirred(word), start = last ^ last >> 31;
    for (int64_t i = 0; i < n; i++)
        mask[i] = stirred(start + (uint64_t)i * 0x9E3779B97F4A7C15u) >> 40 >= least ? (REAL)kept : 0;
}
