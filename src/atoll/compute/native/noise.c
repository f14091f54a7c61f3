/* The draws of compute/discrete_gaussian.py: the same integers, in one pass over the random words. */

#include <stdint.h>

/* out[i] = 16 out[i] + x, where x + reach is the number of edges whose first 32 bits are at most words[i].

   guide[p] for a prefix p of 16 bits is twice the number of edges below all words of this prefix, plus 1 if the prefix
   has an edge itself: such a draw is open, and a search decides. A word that equals an edge is a tie: x counts the edges
   below it, and its place is stored. `places` has room for all draws. Returns the number of ties. */
int64_t join(const uint32_t *words, int64_t n, const uint16_t *guide, const uint32_t *edges, int64_t edge_count,
             int64_t reach, int64_t *out, int64_t *places) {
    int64_t open = 0, ties = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t found = guide[words[i] >> 16];
        out[i] = 16 * out[i] + ((found >> 1) - reach);
        places[open] = i;
        open += found & 1;
    }
    for (int64_t j = 0; j < open; j++) {
        const int64_t i = places[j], below = guide[words[i] >> 16] >> 1;
        int64_t x = below;
        while (x < edge_count && edges[x] < words[i])
            x++;
        out[i] += x - below;
        places[ties] = i;
        ties += x < edge_count && edges[x] == words[i];
    }
    return ties;
}
