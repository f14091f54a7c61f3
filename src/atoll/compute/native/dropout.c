/* The mask of the keyed dropout in compute/overrides.py: the same bits, in one pass. Compiled for float, and for double (WIDE).

   Element i is kept if the upper 24 bits of a scrambled word are at least p · 2²⁴. Words are scrambled as in SplitMix64
   (mix64 and stir64 in base/random.py), without the last shift. */

#include <stdint.h>

#ifdef WIDE
#define REAL double
#else
#define REAL float
#endif

/* The last shift is left out because it does not change the upper 24 bits. */
static inline uint64_t scramble(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    return (x ^ x >> 27) * 0x94D049BB133111EBu;
}

/* mask[i] = kept if element i is kept, else 0. `least` = p · 2²⁴ is an integer. */
void keep(uint64_t word, int64_t n, uint64_t least, double kept, REAL *mask) {
    const uint64_t last = scramble(word), start = last ^ last >> 31;
    for (int64_t i = 0; i < n; i++)
        mask[i] = scramble(start + (uint64_t)i * 0x9E3779B97F4A7C15u) >> 40 >= least ? (REAL)kept : 0;
}
