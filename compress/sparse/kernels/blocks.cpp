// Rows of float32 times a matrix of int8 codes in blocks of four inputs.
//
// Every row of x becomes unsigned bytes first, by a step and a zero of its own:  x ~ step (byte - zero).  Then
//
//     y[r, n] = (sum of byte * code - zero[r] * sums[n]) * (step[r] * scale[n]) + bias[n]
//
// whose sums are whole numbers, so that every path gives the same bits.
//
// A tile of rows lies in memory as [place][row][4 bytes]: what a block of four codes is multiplied by are the same four
// inputs of all rows of the tile, side by side. So one load of the tile, one broadcast of the block and one instruction
// (vpdpbusd) make 64 products, and a block that isn't stored costs nothing. A tile fits the first cache, blocks stream
// past it. Four outputs with as many blocks run side by side: their sums don't wait for one another, they end together,
// and where rows are few they share a register.

#include <algorithm>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace {

struct Plain {
    static constexpr int LANES = 8;

    static void prepare(const Product& p, Tiles& tiles, long tile) {
        std::vector<uint8_t> rows(LANES * tiles.places * BLOCK);
        fill<LANES>(p, tiles, tile, rows.data());
        interleave<LANES>(rows.data(), tiles.places, tiles.tile(tile));
    }

    static void multiply(const Product& p, const Blocks& m, const Tiles& tiles, long tile, const Chunk& chunk) {
        const uint8_t* x = tiles.tile(tile);
        const int32_t* zeros = &tiles.zeros[tile * LANES];
        const float* steps = &tiles.steps[tile * LANES];
        float results[CHUNK * LANES];
        for (long slot = chunk.first; slot < chunk.first + chunk.fours * SIDE; ++slot) {
            const Output out(p, m, chunk, slot);
            int32_t sums[LANES] = {};
            for (long e = m.starts[slot / SIDE]; e < m.starts[slot / SIDE + 1]; ++e) {
                const long at = e * SIDE + slot % SIDE;
                for (int lane = 0; lane < LANES; ++lane)
                    for (int j = 0; j < BLOCK; ++j)
                        sums[lane] += x[(m.places[at] * LANES + lane) * BLOCK + j] * m.codes[at * BLOCK + j];
            }
            for (int lane = 0; lane < LANES; ++lane) {
                const float whole = static_cast<float>(sums[lane] - zeros[lane] * out.sum);
                results[out.place * LANES + lane] = whole * (steps[lane] * out.scale) + out.bias;
            }
        }
        put<LANES>(p, chunk, tile, results);
    }
};

template <typename Way>
void run_tiles(const Product& p, const Blocks& m, const Runner& run) {
    Tiles tiles(p, Way::LANES);
    const long count = tiles.count(p), chunks = ceiling(p.outputs, CHUNK);
    run(count, [&](long tile) { Way::prepare(p, tiles, tile); });
    run(count * chunks, [&](long part) { Way::multiply(p, m, tiles, part / chunks, Chunk(p, part % chunks)); });
}

#if X86

INLINE int32_t block_at(const int8_t* codes, long entry) {
    int32_t block;
    std::memcpy(&block, codes + entry * BLOCK, BLOCK);
    return block;
}

struct Avx2 {
    static constexpr int LANES = 8;

    AVX2 static void prepare(const Product& p, Tiles& tiles, long tile) {
        std::vector<uint8_t> rows(LANES * tiles.places * BLOCK);
        fill<LANES>(p, tiles, tile, rows.data());
        interleave<LANES>(rows.data(), tiles.places, tiles.tile(tile));
    }

    // Bytes and codes widen to sixteen bits, even and odd ones apart, since products of bytes would saturate.
    AVX2 static void multiply(const Product& p, const Blocks& m, const Tiles& tiles, long tile, const Chunk& chunk) {
        const uint8_t* x = tiles.tile(tile);
        const __m256i even = _mm256_set1_epi32(0x00ff00ff);
        const __m256 steps = _mm256_loadu_ps(&tiles.steps[tile * LANES]);
        const __m256i zeros = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&tiles.zeros[tile * LANES]));
        alignas(32) float results[CHUNK * LANES];
        for (long four = chunk.first / SIDE; four < chunk.first / SIDE + chunk.fours; ++four) {
            __m256i sums[SIDE];
            for (int i = 0; i < SIDE; ++i) sums[i] = _mm256_setzero_si256();
            for (long e = m.starts[four]; e < m.starts[four + 1]; ++e)
                for (int i = 0; i < SIDE; ++i) {
                    const long at = e * SIDE + i;
                    const uint8_t* from = x + m.places[at] * (LANES * BLOCK);
                    const __m256i here = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
                    const __m256i block = _mm256_set1_epi32(block_at(m.codes, at));
                    const __m256i evens = _mm256_srai_epi16(_mm256_slli_epi16(block, 8), 8);
                    const __m256i odds = _mm256_srai_epi16(block, 8);
                    const __m256i products = _mm256_madd_epi16(_mm256_and_si256(here, even), evens);
                    const __m256i others = _mm256_madd_epi16(_mm256_srli_epi16(here, 8), odds);
                    sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(products, others));
                }
            for (int i = 0; i < SIDE; ++i) {
                const Output out(p, m, chunk, four * SIDE + i);
                const __m256i shift = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(out.sum));
                const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[i], shift));
                const __m256 scaled = _mm256_mul_ps(whole, _mm256_mul_ps(steps, _mm256_set1_ps(out.scale)));
                _mm256_store_ps(results + out.place * LANES, _mm256_add_ps(scaled, _mm256_set1_ps(out.bias)));
            }
        }
        put<LANES>(p, chunk, tile, results);
    }
};

// Turns sixteen rows of sixteen words each, so far apart, into their columns.
AVX512 INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i below = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i under = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(low, below, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(low, below, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(high, under, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(high, under, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Sixteen rows of a register are one share of a tile; two shares use each block that was fetched twice.
template <int SHARES>
struct Avx512 {
    static constexpr int WIDE = 16, LANES = WIDE * SHARES;

    AVX512 static void prepare(const Product& p, Tiles& tiles, long tile) {
        static thread_local std::vector<uint8_t> rows;
        rows.resize(LANES * tiles.places * BLOCK);
        fill<LANES>(p, tiles, tile, rows.data());
        const long width = tiles.places * BLOCK;
        for (int share = 0; share < SHARES; ++share)
            for (long place = 0; place < tiles.places; place += WIDE) {
                __m512i r[WIDE];
                for (int i = 0; i < WIDE; ++i)
                    r[i] = _mm512_loadu_si512(rows.data() + (share * WIDE + i) * width + place * BLOCK);
                transpose(r);
                uint8_t* to = tiles.tile(tile) + place * LANES * BLOCK + share * WIDE * BLOCK;
                for (int i = 0; i < WIDE; ++i) _mm512_store_si512(to + i * LANES * BLOCK, r[i]);
            }
    }

    AVX512 static void multiply(const Product& p, const Blocks& m, const Tiles& tiles, long tile, const Chunk& chunk) {
        const uint8_t* x = tiles.tile(tile);
        alignas(64) float results[CHUNK * LANES];
        for (long four = chunk.first / SIDE; four < chunk.first / SIDE + chunk.fours; ++four) {
            __m512i sums[SIDE][SHARES];
            for (int i = 0; i < SIDE; ++i)
                for (int s = 0; s < SHARES; ++s) sums[i][s] = _mm512_setzero_si512();
            for (long e = m.starts[four]; e < m.starts[four + 1]; ++e)
                for (int i = 0; i < SIDE; ++i) {
                    const uint8_t* here = x + m.places[e * SIDE + i] * (LANES * BLOCK);
                    const __m512i block = _mm512_set1_epi32(block_at(m.codes, e * SIDE + i));
                    for (int s = 0; s < SHARES; ++s)
                        sums[i][s] = _mm512_dpbusd_epi32(sums[i][s], _mm512_load_si512(here + s * WIDE * BLOCK), block);
                }
            for (int i = 0; i < SIDE; ++i) {
                const Output out(p, m, chunk, four * SIDE + i);
                for (int s = 0; s < SHARES; ++s) {
                    const long first = tile * LANES + s * WIDE;
                    const __m512i zeros = _mm512_loadu_si512(&tiles.zeros[first]);
                    const __m512 steps = _mm512_loadu_ps(&tiles.steps[first]);
                    const __m512i shift = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(out.sum));
                    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][s], shift));
                    const __m512 scaled = _mm512_mul_ps(whole, _mm512_mul_ps(steps, _mm512_set1_ps(out.scale)));
                    _mm512_store_ps(results + (out.place * SHARES + s) * WIDE,
                                    _mm512_add_ps(scaled, _mm512_set1_ps(out.bias)));
                }
            }
        }
        for (int s = 0; s < SHARES; ++s) {
            const long first = tile * LANES + s * WIDE, rows = std::min<long>(WIDE, p.rows - first);
            for (long begin = 0; begin < chunk.count && rows > 0; begin += WIDE) {
                __m512i r[WIDE];
                for (int i = 0; i < WIDE; ++i) r[i] = _mm512_load_si512(results + ((begin + i) * SHARES + s) * WIDE);
                transpose(r);
                const long left = chunk.count - begin;
                const __mmask16 there = left >= WIDE ? 0xffff : (1u << left) - 1;
                for (long row = 0; row < rows; ++row)
                    _mm512_mask_storeu_epi32(p.y + (first + row) * p.outputs + chunk.first + begin, there, r[row]);
            }
        }
    }
};

// Few rows: those of four outputs share a register.
struct Avx512Few {
    static constexpr int LANES = 4;

    AVX512 static void prepare(const Product& p, Tiles& tiles, long tile) {
        static thread_local std::vector<uint8_t> rows;
        rows.resize(LANES * tiles.places * BLOCK);
        fill<LANES>(p, tiles, tile, rows.data());
        interleave<LANES>(rows.data(), tiles.places, tiles.tile(tile));
    }

    AVX512 static void multiply(const Product& p, const Blocks& m, const Tiles& tiles, long tile, const Chunk& chunk) {
        const __m128i* x = reinterpret_cast<const __m128i*>(tiles.tile(tile));
        const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        const __m128 steps = _mm_loadu_ps(&tiles.steps[tile * LANES]);
        const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&tiles.zeros[tile * LANES]));
        alignas(64) float results[CHUNK * LANES];
        for (long four = chunk.first / SIDE; four < chunk.first / SIDE + chunk.fours; ++four) {
            __m512i sums = _mm512_setzero_si512();
            for (long e = m.starts[four]; e < m.starts[four + 1]; ++e) {
                const uint16_t* at = m.places + e * SIDE;
                const __m128i blocks = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m.codes + e * SIDE * BLOCK));
                const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(x[at[0]]), x[at[1]], 1);
                const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(x[at[2]]), x[at[3]], 1);
                const __m512i here = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
                sums = _mm512_dpbusd_epi32(sums, here, _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(blocks)));
            }
            alignas(64) int32_t each[SIDE][LANES];
            _mm512_store_si512(each, sums);
            for (int i = 0; i < SIDE; ++i) {
                const Output out(p, m, chunk, four * SIDE + i);
                const __m128i sum = _mm_load_si128(reinterpret_cast<const __m128i*>(each[i]));
                const __m128 whole = _mm_cvtepi32_ps(_mm_sub_epi32(sum, _mm_mullo_epi32(zeros, _mm_set1_epi32(out.sum))));
                const __m128 scaled = _mm_mul_ps(whole, _mm_mul_ps(steps, _mm_set1_ps(out.scale)));
                _mm_store_ps(results + out.place * LANES, _mm_add_ps(scaled, _mm_set1_ps(out.bias)));
            }
        }
        put<LANES>(p, chunk, tile, results);
    }
};

#endif

}  // namespace

void multiply(const Product& p, const Blocks& m, Path path, const Runner& run) {
#if X86
    if (path == WITH_AVX512) {
        if (p.rows <= 4) return run_tiles<Avx512Few>(p, m, run);
        if (p.rows <= 16) return run_tiles<Avx512<1>>(p, m, run);
        return run_tiles<Avx512<2>>(p, m, run);
    }
    if (path == WITH_AVX2) return run_tiles<Avx2>(p, m, run);
#endif
    run_tiles<Plain>(p, m, run);
}
