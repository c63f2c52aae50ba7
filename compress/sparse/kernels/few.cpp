// One to four rows times a matrix in blocks: sixteen outputs are the lanes of a register.
//
// With so few rows a load for each block is what costs. So x is looked up in registers: 32 blocks of a row, 128 inputs,
// are two of them, from which one instruction (vpermi2d) gives sixteen outputs a block each. A step is such a look-up for
// all rows; outputs that have no further block in its segment of x take zeros. That wastes lanes, about half of them
// where a tenth of the blocks is stored, and still a step does for many blocks what would be a load for each. Steps go
// in pairs that share what was loaded of x.

#include <algorithm>
#include <array>

#include "rounding.h"
#include "sparse.h"

namespace {

constexpr long WIDE = 16, SEGMENT = 32, PAIR = 2;  // outputs of a group; blocks of a segment; steps that share it

}  // namespace

FewRows::FewRows(const Blocks& m, long inputs, long outputs) : starts{0} {
    struct Block {
        long segment;
        uint8_t place;
        const int8_t* codes;
    };
    std::vector<std::vector<Block>> of(rounded_up(outputs, WIDE));
    for (long four = 0; four < ceiling(outputs, SIDE); ++four)
        for (long e = m.starts[four]; e < m.starts[four + 1]; ++e)
            for (int i = 0; i < SIDE; ++i) {
                const long n = m.order[four * SIDE + i], place = m.places[e * SIDE + i];
                const int8_t* four_codes = m.codes + (e * SIDE + i) * BLOCK;
                const bool stored = std::any_of(four_codes, four_codes + BLOCK, [](int8_t code) { return code != 0; });
                if (n < outputs && stored)
                    of[n].push_back({place / SEGMENT, static_cast<uint8_t>(place % SEGMENT), four_codes});
            }
    const auto append = [&](long segment) {
        segments.push_back(segment);
        places.resize(places.size() + WIDE);
        codes.resize(codes.size() + WIDE * BLOCK);
    };
    const long count = ceiling(ceiling(inputs, BLOCK), SEGMENT);
    for (size_t first = 0; first < of.size(); first += WIDE) {
        std::array<size_t, WIDE> next{};
        for (long segment = 0; segment < count; ++segment)
            for (bool more = true; more || segments.size() % PAIR;) {
                const bool filled = !more;  // the second step of a pair may have no blocks
                more = false;
                if (filled) append(segment);
                for (long lane = 0; lane < WIDE; ++lane) {
                    const auto& blocks = of[first + lane];
                    if (next[lane] == blocks.size() || blocks[next[lane]].segment != segment) continue;
                    if (!more) append(segment);
                    more = true;
                    const Block& block = blocks[next[lane]++];
                    places[places.size() - WIDE + lane] = block.place;
                    std::copy(block.codes, block.codes + BLOCK, codes.end() - (WIDE - lane) * BLOCK);
                }
            }
        starts.push_back(segments.size());
    }
}

#if X86

namespace {

AVX512 void prepare(const Product& p, long width, uint8_t* bytes, float* steps, int32_t* zeros) {
    for (long row = 0; row < p.rows; ++row) {
        round_row(p.x + row * p.inputs, p.inputs, bytes + row * width, steps[row], zeros[row]);
        std::memset(bytes + row * width + p.inputs, 0, width - p.inputs);
    }
}

template <int R>
AVX512 void group(const Product& p, const Blocks& m, const FewRows& f, long index, const uint8_t* x, long width,
                  const float* steps, const int32_t* zeros) {
    __m512i sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_si512();
    for (long s = f.starts[index]; s < f.starts[index + 1]; s += PAIR) {
        const auto* at = reinterpret_cast<const __m128i*>(f.places.data() + s * WIDE);
        const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
        const __m512i others = _mm512_cvtepu8_epi32(_mm_loadu_si128(at + 1));
        const __m512i codes = _mm512_loadu_si512(f.codes.data() + s * WIDE * BLOCK);
        const __m512i other_codes = _mm512_loadu_si512(f.codes.data() + (s + 1) * WIDE * BLOCK);
        const uint8_t* here = x + f.segments[s] * (SEGMENT * BLOCK);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512i low = _mm512_loadu_si512(here + r * width), high = _mm512_loadu_si512(here + r * width + 64);
            sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_permutex2var_epi32(low, places, high), codes);
            sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_permutex2var_epi32(low, others, high), other_codes);
        }
    }
    const long first = index * WIDE, left = p.outputs - first;
    const __mmask16 there = left >= WIDE ? 0xffff : (1u << left) - 1;
    const __m512i shifts = _mm512_maskz_loadu_epi32(there, m.sums + first);
    const __m512 scales = _mm512_maskz_loadu_ps(there, m.scale + first);
    const __m512 biases = p.bias ? _mm512_maskz_loadu_ps(there, p.bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const __m512i shift = _mm512_mullo_epi32(_mm512_set1_epi32(zeros[r]), shifts);
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r], shift));
        const __m512 scaled = _mm512_mul_ps(whole, _mm512_mul_ps(_mm512_set1_ps(steps[r]), scales));
        _mm512_mask_storeu_ps(p.y + r * p.outputs + first, there, _mm512_add_ps(scaled, biases));
    }
}

}  // namespace

void multiply(const Product& p, const Blocks& m, const FewRows& f, const Runner& run) {
    using Group = decltype(&group<1>);
    static constexpr Group GROUPS[FewRows::MOST + 1] = {nullptr, group<1>, group<2>, group<3>, group<4>};
    const long width = rounded_up(p.inputs, SEGMENT * BLOCK), groups = ceiling(p.outputs, WIDE);
    const Scratch bytes = scratch(p.rows * width);
    float steps[FewRows::MOST];
    int32_t zeros[FewRows::MOST];
    prepare(p, width, bytes.get(), steps, zeros);
    run(ceiling(p.outputs, CHUNK), [&](long part) {
        constexpr long EACH = CHUNK / WIDE;
        for (long index = part * EACH; index < std::min(groups, (part + 1) * EACH); ++index)
            GROUPS[p.rows](p, m, f, index, bytes.get(), width, steps, zeros);
    });
}

#else

void multiply(const Product& p, const Blocks& m, const FewRows&, const Runner& run) { multiply(p, m, PLAIN, run); }

#endif
