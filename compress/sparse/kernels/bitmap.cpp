// Rows of float32 times a matrix of single weights with a bit for each, which says whether it is stored.
//
// What a matrix of any size costs with few rows is fetching it, so it is fetched packed and spread out in registers: the
// bits of sixteen (AVX-512) or eight (AVX2) inputs choose the lanes that the next stored weights go to, and the others
// are zeros. Each register of weights then serves all rows of a tile. Sums are float32.

#include <algorithm>
#include <array>
#include <cstring>

#include "sparse.h"

namespace {

constexpr int WORD = 32, ROWS = 8;  // rows in a tile

INLINE float value_at(const void* values, bool halves, long entry) {
    if (!halves) return static_cast<const float*>(values)[entry];
    const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(values)[entry]) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// One output for so many rows, which begin at x and lie `stride` apart.
struct Plain {
    template <int R>
    static void dot(const Bitmap& m, const float* x, long stride, long words, long n, float* sums) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = 0;
        long entry = m.starts[n];
        for (long w = 0; w < words; ++w)
            for (uint32_t bits = m.bits[n * words + w]; bits; bits &= bits - 1) {
                const float value = value_at(m.values, m.halves, entry++);
                const float* here = x + w * WORD + __builtin_ctz(bits);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sums[r] += value * here[r * stride];
            }
    }
};

#if X86

// For every byte, which of the next stored weights each of its eight lanes takes.
struct Lanes {
    alignas(32) int32_t from[256][8];
    constexpr Lanes() : from() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane) from[bits][lane] = (bits >> lane & 1) ? next++ : 0;
    }
};
constexpr Lanes LANES;

struct Avx2 {
    // The next eight stored weights; what follows the row isn't read.
    AVX2 static INLINE __m256 next(const Bitmap& m, long entry, long end) {
        if (entry + 8 > end) {
            alignas(32) float left[8] = {};
            for (long j = 0; entry + j < end; ++j) left[j] = value_at(m.values, m.halves, entry + j);
            return _mm256_load_ps(left);
        }
        if (!m.halves) return _mm256_loadu_ps(static_cast<const float*>(m.values) + entry);
        const auto* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(m.values) + entry);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
    }

    template <int R>
    AVX2 static void dot(const Bitmap& m, const float* x, long stride, long words, long n, float* sums) {
        const __m256i places = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
        __m256 total[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[r] = _mm256_setzero_ps();
        long entry = m.starts[n];
        const long end = m.starts[n + 1];
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(m.bits + n * words);
        for (long b = 0; b < words * 4; ++b) {
            if (!bytes[b]) continue;
            const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bytes[b]), places);
            const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(LANES.from[bytes[b]]));
            const __m256 spread = _mm256_permutevar8x32_ps(next(m, entry, end), lanes);
            const __m256 weights = _mm256_and_ps(spread, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, places)));
            entry += __builtin_popcount(bytes[b]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                total[r] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + r * stride + b * 8), total[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m128 half = _mm_add_ps(_mm256_castps256_ps128(total[r]), _mm256_extractf128_ps(total[r], 1));
            const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            sums[r] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
        }
    }
};

// Zeros that the compiler doesn't know for such. Spreading out zeroes the other lanes by itself, but as AMD's processors
// do it waits for what the register held before; a register that is a copy of this one waits for nothing.
AVX512 INLINE __m512i opaque_zeros() {
    __m512i zeros = _mm512_setzero_si512();
    asm("" : "+v"(zeros));
    return zeros;
}

struct Avx512 {
    // The stored weights from `entry` on, in the lanes whose bits are set; none past `last` are read.
    AVX512 static INLINE __m512 spread(const float* values, long entry, long last, __mmask16 bits, __m512 zeros) {
        const __m512 next = entry + 16 <= last ? _mm512_loadu_ps(values + entry)
                                               : _mm512_maskz_loadu_ps((1u << (last - entry)) - 1, values + entry);
        return _mm512_mask_expand_ps(zeros, bits, next);
    }

    template <int R>
    AVX512 static void dot(const Bitmap& m, const float* x, long stride, long words, long n, float* sums) {
        __m512 low[R], high[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
        const __m512 zeros = _mm512_castsi512_ps(opaque_zeros());
        const float* values = static_cast<const float*>(m.values);
        const uint32_t* bits = m.bits + n * words;
        long entry = m.starts[n];
        for (long w = 0; w < words; ++w) {
            const uint32_t first = bits[w] & 0xffff;
            const __m512 a = spread(values, entry, m.entries, first, zeros);
            const __m512 b = spread(values, entry + __builtin_popcount(first), m.entries, bits[w] >> 16, zeros);
            entry += __builtin_popcount(bits[w]);
            const float* here = x + w * WORD;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                low[r] = _mm512_fmadd_ps(a, _mm512_loadu_ps(here + r * stride), low[r]);
                high[r] = _mm512_fmadd_ps(b, _mm512_loadu_ps(here + r * stride + 16), high[r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(low[r], high[r]));
    }
};

// Upper halves of floats spread out thirty-two at a time: those of even inputs are floats once they are shifted up, those
// of odd ones once the others are masked away. So x lies with the even inputs of each word before the odd ones.
struct Avx512Halves {
    template <int R>
    VBMI2 static void dot(const Bitmap& m, const float* x, long stride, long words, long n, float* sums) {
        __m512 even[R], odd[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
        const uint16_t* values = static_cast<const uint16_t*>(m.values);
        const uint32_t* bits = m.bits + n * words;
        const __m512i zeros = opaque_zeros();
        const __m512i upper = _mm512_set1_epi32(0xffff0000);
        long entry = m.starts[n];
        for (long w = 0; w < words; ++w) {
            const __m512i next = entry + 32 <= m.entries
                                     ? _mm512_loadu_si512(values + entry)
                                     : _mm512_maskz_loadu_epi16((1ull << (m.entries - entry)) - 1, values + entry);
            const __m512i both = _mm512_mask_expand_epi16(zeros, bits[w], next);
            const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
            entry += __builtin_popcount(bits[w]);
            const float* here = x + w * WORD;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                even[r] = _mm512_fmadd_ps(a, _mm512_loadu_ps(here + r * stride), even[r]);
                odd[r] = _mm512_fmadd_ps(b, _mm512_loadu_ps(here + r * stride + 16), odd[r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
    }
};

#endif

using Dot = void (*)(const Bitmap&, const float*, long, long, long, float*);

template <typename Way>
std::array<Dot, ROWS + 1> dots() {
    return {nullptr,             Way::template dot<1>, Way::template dot<2>, Way::template dot<3>, Way::template dot<4>,
            Way::template dot<5>, Way::template dot<6>, Way::template dot<7>, Way::template dot<8>};
}

}  // namespace

void multiply(const Product& p, const Bitmap& m, Path path, const Runner& run) {
    std::array<Dot, ROWS + 1> dot = dots<Plain>();
    bool paired = false;
#if X86
    paired = path == WITH_AVX512 && m.halves && __builtin_cpu_supports("avx512vbmi2");
    if (paired) dot = dots<Avx512Halves>();
    else if (path == WITH_AVX512 && !m.halves) dot = dots<Avx512>();
    else if (path != PLAIN) dot = dots<Avx2>();
#endif
    const long words = ceiling(p.inputs, WORD), stride = words * WORD;
    const bool copied = paired || stride != p.inputs;
    const float* x = p.x;
    Scratch filled = scratch(copied ? p.rows * stride * sizeof(float) : 0);
    if (copied) {  // inputs that fill up the last word are zeros
        float* copy = reinterpret_cast<float*>(filled.get());
        std::fill(copy, copy + p.rows * stride, 0.0f);
        for (long row = 0; row < p.rows; ++row)
            for (long k = 0; k < p.inputs; ++k) {
                const long within = paired ? k % WORD / 2 + k % 2 * (WORD / 2) : k % WORD;
                copy[row * stride + k - k % WORD + within] = p.x[row * p.inputs + k];
            }
        x = copy;
    }
    const long tiles = ceiling(p.rows, ROWS);
    run(ceiling(p.outputs, CHUNK), [&](long part) {
        const long end = std::min(p.outputs, (part + 1) * CHUNK);
        for (long tile = 0; tile < tiles; ++tile) {  // of even sizes: eight and one would fetch all for the one
            const long first = p.rows * tile / tiles, rows = p.rows * (tile + 1) / tiles - first;
            for (long n = part * CHUNK; n < end; ++n) {
                float sums[ROWS];
                dot[rows](m, x + first * stride, stride, words, n, sums);
                for (long r = 0; r < rows; ++r)
                    p.y[(first + r) * p.outputs + n] = sums[r] + (p.bias ? p.bias[n] : 0.0f);
            }
        }
    });
}
