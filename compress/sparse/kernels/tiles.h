// Tiles of rows, as products with blocks read them: [place][row][4 bytes]; and what becomes of their sums.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "rounding.h"
#include "sparse.h"

namespace {

struct Tiles {
    int lanes;  // rows in a tile
    long places;
    Scratch bytes;  // (tiles, places, lanes, 4)
    std::vector<float> steps;    // (tiles * lanes,)
    std::vector<int32_t> zeros;  // the same

    Tiles(const Product& p, int lanes)
        : lanes(lanes),
          places(rounded_up(ceiling(p.inputs, BLOCK), 16)),
          bytes(scratch(count(p) * places * lanes * BLOCK)),
          steps(count(p) * lanes),
          zeros(count(p) * lanes) {}

    long count(const Product& p) const { return ceiling(p.rows, lanes); }
    uint8_t* tile(long index) const { return bytes.get() + index * places * lanes * BLOCK; }
};

// The rows of one tile as bytes in their places; rows past the last one are zeros.
template <int LANES>
INLINE void fill(const Product& p, Tiles& tiles, long tile, uint8_t* rows) {
    const long width = tiles.places * BLOCK;
    for (int lane = 0; lane < LANES; ++lane) {
        const long row = tile * LANES + lane;
        uint8_t* bytes = rows + lane * width;
        float step = 0;
        int32_t zero = 0;
        if (row < p.rows) round_row(p.x + row * p.inputs, p.inputs, bytes, step, zero);
        const long known = row < p.rows ? p.inputs : 0;
        std::memset(bytes + known, 0, width - known);
        tiles.steps[tile * LANES + lane] = step;
        tiles.zeros[tile * LANES + lane] = zero;
    }
}

template <int LANES>
INLINE void interleave(const uint8_t* rows, long places, uint8_t* tile) {
    const int32_t* from = reinterpret_cast<const int32_t*>(rows);
    int32_t* to = reinterpret_cast<int32_t*>(tile);
    for (long place = 0; place < places; ++place)
        for (int lane = 0; lane < LANES; ++lane) to[place * LANES + lane] = from[lane * places + place];
}

struct Chunk {
    long first, count, fours;
    Chunk(const Product& p, long index)
        : first(index * CHUNK), count(std::min(CHUNK, p.outputs - first)), fours(ceiling(count, SIDE)) {}
};

// What whole sums become: the output of a slot, where it goes in the results of a chunk, and its factors. Slots that
// fill up the last four lie past the last output, and go where nobody looks.
struct Output {
    long place;
    float scale, bias;
    int32_t sum;

    INLINE Output(const Product& p, const Blocks& m, const Chunk& chunk, long slot) {
        const long n = m.order[slot], known = std::min(n, p.outputs - 1);
        place = n - chunk.first;
        scale = m.scale[known];
        sum = m.sums[known];
        bias = p.bias ? p.bias[known] : 0.0f;
    }
};

// Results of a chunk (CHUNK, LANES) into y.
template <int LANES>
INLINE void put(const Product& p, const Chunk& chunk, long tile, const float* results) {
    const long rows = std::min<long>(LANES, p.rows - tile * LANES);
    for (long lane = 0; lane < rows; ++lane) {
        float* y = p.y + (tile * LANES + lane) * p.outputs + chunk.first;
        for (long n = 0; n < chunk.count; ++n) y[n] = results[n * LANES + lane];
    }
}

}  // namespace
