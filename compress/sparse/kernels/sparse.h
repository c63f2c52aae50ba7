// Products of dense rows with sparse matrices (out, in), stored as compress/sparse/formats.py tells.
//
// A product is a job cut into parts that any threads may take in any order; who runs them, OpenMP or the pool of an ONNX
// Runtime session, is not the kernels' affair. Each instruction set has its own functions, compiled with it whatever
// the flags say and chosen when a job begins.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define AVX512 __attribute__((target("avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define VBMI2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2")))
#else
#define X86 0
#endif
#define INLINE inline __attribute__((always_inline))

enum Path { PLAIN = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };

// The best path that this processor has.
Path best_path();

// Runs part 0 .. parts - 1, all of them before it returns.
using Runner = std::function<void(long parts, const std::function<void(long)>& part)>;

// Memory that begins at a cache line.
using Scratch = std::unique_ptr<unsigned char, void (*)(void*)>;
Scratch scratch(long bytes);

inline long rounded_up(long count, long step) { return (count + step - 1) / step * step; }
inline long ceiling(long count, long step) { return (count + step - 1) / step; }

constexpr long CHUNK = 64;           // outputs in a part
constexpr int BLOCK = 4, SIDE = 4;   // inputs of a block; outputs whose blocks lie side by side

struct Product {
    const float* x;  // (rows, inputs)
    float* y;        // (rows, outputs)
    const float* bias;  // (outputs,), or null
    long rows, inputs, outputs;
};

struct Blocks {  // the rows of the matrix are outputs, four of them side by side
    const int32_t* order;    // (slots,): the output in each slot; those of a chunk share a chunk
    const int32_t* starts;   // (slots / 4 + 1,)
    const uint16_t* places;  // (entries, 4)
    const int8_t* codes;     // (entries, 4, 4)
    const float* scale;      // (outputs,)
    const int32_t* sums;     // (outputs,) of the codes
};

struct Bitmap {
    const uint32_t* bits;   // (outputs, words)
    const int32_t* starts;  // (outputs + 1,)
    const void* values;     // (entries,): float, or the upper halves of floats
    bool halves;
    long entries;
};

// The blocks of a matrix laid out anew, for products of at most MOST rows; whoever keeps a matrix may keep it beside.
struct FewRows {
    static constexpr long MOST = 4;
    std::vector<int32_t> starts;    // (groups + 1,) into the steps: sixteen outputs are a group
    std::vector<uint16_t> segments; // (steps,): which 32 blocks of x a step looks into
    std::vector<uint8_t> places;    // (steps, 16): which of them each output takes
    std::vector<int8_t> codes;      // (steps, 16, 4)

    FewRows(const Blocks& matrix, long inputs, long outputs);
};

void multiply(const Product& product, const Blocks& matrix, Path path, const Runner& run);
void multiply(const Product& product, const Blocks& matrix, const FewRows& laid_out, const Runner& run);  // WITH_AVX512
void multiply(const Product& product, const Bitmap& matrix, Path path, const Runner& run);
