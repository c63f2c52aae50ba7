// What C, and so Python, calls. Tensors are as compress/sparse/formats.py tells; `path` is a Path, or -1 for the best.
// Returns 0, or 1 where this processor lacks the path.

#include <cstdlib>
#include <new>

#include "sparse.h"

Path best_path() {
#if X86
    static const Path best = [] {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
            return PLAIN;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
        return wide ? WITH_AVX512 : WITH_AVX2;
    }();
    return best;
#else
    return PLAIN;
#endif
}

Scratch scratch(long bytes) {
    void* found = std::aligned_alloc(64, rounded_up(bytes + 1, 64));
    if (!found) throw std::bad_alloc();
    return Scratch(static_cast<unsigned char*>(found), std::free);
}

namespace {

Runner on_threads(int threads) {
    return [threads](long parts, const std::function<void(long)>& part) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
        for (long i = 0; i < parts; ++i) part(i);
    };
}

}  // namespace

extern "C" {

int hf_compress_best_path() { return best_path(); }

int hf_compress_blocks(int path, int threads, long rows, long inputs, long outputs, const float* x,
                       const int32_t* order, const int32_t* starts, const uint16_t* places, const int8_t* codes,
                       const float* scale, const int32_t* sums, const float* bias, float* y) {
    if (path > best_path()) return 1;
    multiply({x, y, bias, rows, inputs, outputs}, Blocks{order, starts, places, codes, scale, sums},
             path < 0 ? best_path() : static_cast<Path>(path), on_threads(threads));
    return 0;
}

int hf_compress_bitmap(int path, int threads, long rows, long inputs, long outputs, const float* x,
                       const uint32_t* bits, const int32_t* starts, const void* values, int halves, const float* bias,
                       float* y) {
    if (path > best_path()) return 1;
    multiply({x, y, bias, rows, inputs, outputs}, Bitmap{bits, starts, values, halves != 0, starts[outputs]},
             path < 0 ? best_path() : static_cast<Path>(path), on_threads(threads));
    return 0;
}
}
