// The few things that kernels here need of the hardware, each a function, so that tests can put others in their place
// and run the very same kernels on a CPU, lane by lane (tests/emulated.h).
//
// Fragments of mma.sync m16n8k16, of lane = 4 g + t: of A (16 x 16) the pairs of columns 2t, 2t + 1 of rows g and g + 8,
// then those of columns 2t + 8, 2t + 9; of B (16 x 8) the same two pairs of rows, of column g; of C (16 x 8) columns
// 2t, 2t + 1 of row g, then of row g + 8. As a sum may go in any order, kernels give a lane whichever inputs lie
// together in memory, and only take care that A and B agree.

#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern __shared__ __align__(128) unsigned char block_memory[];

__device__ __forceinline__ unsigned char* shared_memory() { return block_memory; }

// What is read once, through the path for constants.
template <typename V>
__device__ __forceinline__ V load(const V* from) {
    return __ldg(from);
}

// Sixteen bytes from global to shared memory, behind the back of the registers; those past `available` become zeros and
// are not read. The copies of a thread since the last `commit` are a group; `wait<n>` waits for all but the last n.
__device__ __forceinline__ void copy16(void* to, const void* from, int available) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(available) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// bytes of b:a chosen by the four low hexadecimal digits of `which`
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    return __byte_perm(a, b, which);
}

// WHOLE is a pair of numbers whose least bit is worth 1, EIGHT the same and 8 more, MINUS a pair of -1.
struct Bf16 {
    static constexpr uint32_t WHOLE = 0x43004300u, EIGHT = 0x43084308u, MINUS = 0xbf80bf80u;
    static __device__ __forceinline__ float wide(uint16_t value) {
        return __uint_as_float(static_cast<uint32_t>(value) << 16);
    }
    static __device__ __forceinline__ uint16_t narrow(float value) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    }
    // (a - offset) scale, of both halves; each step rounds to nearest
    static __device__ __forceinline__ uint32_t scaled(uint32_t a, uint32_t offset, uint32_t scale) {
        uint32_t less, result;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(less) : "r"(a), "r"(0x3f803f80u), "r"(offset ^ 0x80008000u));
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(less), "r"(scale), "r"(0x80008000u));
        return result;
    }
    static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

struct Fp16 {
    static constexpr uint32_t WHOLE = 0x64006400u, EIGHT = 0x64086408u, MINUS = 0xbc00bc00u;
    static __device__ __forceinline__ float wide(uint16_t value) { return __half2float(__ushort_as_half(value)); }
    static __device__ __forceinline__ uint16_t narrow(float value) { return __half_as_ushort(__float2half_rn(value)); }
    static __device__ __forceinline__ uint32_t scaled(uint32_t a, uint32_t offset, uint32_t scale) {
        uint32_t less, result;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(less) : "r"(a), "r"(offset));
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(less), "r"(scale));
        return result;
    }
    static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

#else
#include "emulated.h"
#endif

constexpr int LANES = 32, OUTPUTS = 16, BATCH = 8;  // of a warp; outputs and rows of x of one mma

// Launches a kernel; returns the error, 0 if none. `error` of a failed launch is not left for others to find.
template <typename... Wanted, typename... Given>
int launch(void (*kernel)(Wanted...), dim3 blocks, int threads, int bytes, void* stream, Given... given) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    const int launched = cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...);
    const int before = cudaGetLastError();
    return launched ? launched : before;
}

// The error's name.
extern "C" inline __attribute__((used)) const char* hf_compress_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

inline int ceiling(long count, long step) { return static_cast<int>((count + step - 1) / step); }

// What a block's warps summed, each over inputs of its own, for one tile of 16 outputs: added in the warps' order, so
// the same each time, then scaled, and stored where (rows, outputs) y has them. `sums` are a warp's fragments of C.
template <typename T, int TILES>
__device__ __forceinline__ void finish(const float (&sums)[TILES][4], int tile, int rows, int outputs,
                                       const float* scale, const uint16_t* bias, uint16_t* y) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int g = lane / 4, t = lane % 4;
    constexpr int WIDTH = TILES * BATCH;
    float* parts = reinterpret_cast<float*>(shared_memory());  // (warps, rows of x, outputs)
    __syncthreads();
#pragma unroll
    for (int q = 0; q < TILES; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            parts[(warp * WIDTH + q * BATCH + 2 * t + i % 2) * OUTPUTS + g + i / 2 * 8] = sums[q][i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * OUTPUTS; i += blockDim.x) {
        const int output = tile * OUTPUTS + i % OUTPUTS;
        if (output >= outputs) continue;
        float sum = 0;
        for (int part = 0; part < warps; ++part) sum += parts[part * WIDTH * OUTPUTS + i];
        if (scale) sum *= load(scale + output);
        if (bias) sum += T::wide(load(bias + output));
        y[static_cast<long>(i / OUTPUTS) * outputs + output] = T::narrow(sum);
    }
}
