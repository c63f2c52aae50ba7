// What compress/sparse/cuda/device.cuh offers, on a CPU: the kernels' own sources compiled by a C++ compiler, so that
// their indices, what they read and what they wait for are tested without a GPU. Nothing here says how fast they are.
//
// Each lane is a context of its own that runs until it must wait for others: at a barrier, or where a warp exchanges
// something. Lanes run in rising or falling order, so that a barrier that lacks is met by one of both. Copies to shared
// memory happen as late as they may: when they are waited for. Shared memory is poisoned, and what is loaded must lie in
// memory that was announced.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

using cudaStream_t = void*;
using cudaError_t = int;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename K>
int cudaFuncSetAttribute(K, int, int) { return 0; }
inline int cudaGetLastError() { return 0; }
inline int cudaSetDevice(int) { return 0; }
inline const char* cudaGetErrorString(int) { return "emulated"; }

namespace emulated {

constexpr int WARP = 32;
struct Copy { void* to; const void* from; int available; };
struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Meeting { int arrived = 0, turn = 0; };
struct Exchange { uint64_t held[2][WARP][8]; Meeting meeting; };

inline std::vector<std::pair<const char*, size_t>> announced;
inline int violations = 0, falling = 0;
inline std::vector<Lane> lanes;
inline std::vector<Exchange> warps;
inline Meeting block;
inline std::vector<unsigned char> shared;
inline ucontext_t home;
inline void (*body)(void*);
inline void* argument;
inline int current;

inline void check(const void* from, size_t bytes, size_t alignment) {
    const char* begin = static_cast<const char*>(from);
    const bool aligned = reinterpret_cast<uintptr_t>(from) % alignment == 0;
    for (auto& [start, length] : announced)
        if (aligned && begin >= start && begin + bytes <= start + length) return;
    ++violations;
}

inline void pass() { swapcontext(&lanes[current].context, &home); }

inline void meet(Meeting& meeting, int wanted) {
    const int turn = meeting.turn;
    if (++meeting.arrived == wanted) meeting.arrived = 0, ++meeting.turn;
    while (meeting.turn == turn) pass();
}

// Puts in a lane's numbers and gives those of all lanes of its warp.
inline const uint64_t (*exchange(const uint64_t* mine, int count))[8] {
    Exchange& warp = warps[current / WARP];
    auto& held = warp.held[warp.meeting.turn % 2];
    std::copy(mine, mine + count, held[current % WARP]);
    meet(warp.meeting, WARP);
    return held;
}

inline void enter() {
    body(argument);
    lanes[current].done = true;
    pass();
}

inline void run_block(int threads, int bytes) {
    shared.assign(bytes + 128, 0xff);
    lanes.assign(threads, {});
    warps.assign(threads / WARP, {});
    block = {};
    for (Lane& lane : lanes) {
        lane.stack.resize(1 << 16);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        lane.context.uc_link = &home;
        makecontext(&lane.context, enter, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < threads; ++i) {
            current = falling ? threads - 1 - i : i;
            if (lanes[current].done) continue;
            any = true;
            swapcontext(&home, &lanes[current].context);
        }
    }
}


}  // namespace emulated

#define threadIdx (dim3(emulated::current))
inline dim3 blockIdx, blockDim, gridDim;

template <typename... Wanted, typename... Given>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given... given) {
    auto call = [&] { kernel(given...); };
    emulated::body = [](void* it) { (*static_cast<decltype(call)*>(it))(); };
    emulated::argument = &call;
    gridDim = config->gridDim, blockDim = config->blockDim;
    for (unsigned z = 0; z < config->gridDim.z; ++z)
        for (unsigned y = 0; y < config->gridDim.y; ++y)
            for (unsigned x = 0; x < config->gridDim.x; ++x) {
                blockIdx = dim3(x, y, z);
                emulated::run_block(config->blockDim.x, config->dynamicSmemBytes);
            }
    return 0;
}

inline unsigned char* shared_memory() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(emulated::shared.data()) + 127) & ~127ull);
}

template <typename V>
V load(const V* from) {
    emulated::check(from, sizeof(V), sizeof(V));
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

inline void copy16(void* to, const void* from, int available) {
    emulated::check(from, available, 16);
    emulated::violations += reinterpret_cast<uintptr_t>(to) % 16 != 0;
    emulated::lanes[emulated::current].open.push_back({to, from, available});
}
inline void commit() {
    auto& lane = emulated::lanes[emulated::current];
    lane.groups.push_back(std::move(lane.open));
    lane.open.clear();
}
template <int N>
void wait() {
    auto& groups = emulated::lanes[emulated::current].groups;
    while (groups.size() > N) {
        for (auto& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, copy.available);
        }
        groups.erase(groups.begin());
    }
}

inline void __syncthreads() { emulated::meet(emulated::block, emulated::lanes.size()); }
inline void __syncwarp() { emulated::exchange(nullptr, 0); }
inline int __shfl_xor_sync(unsigned, int value, int mask) {
    const uint64_t mine = static_cast<uint32_t>(value);
    return static_cast<int>(emulated::exchange(&mine, 1)[(emulated::current % emulated::WARP) ^ mask][0]);
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
using std::max;
using std::min;

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= (bytes >> (8 * (which >> 4 * i & 7)) & 255) << 8 * i;
    return found;
}

namespace emulated {

template <typename T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint64_t mine[] = {a0, a1, a2, a3, b0, b1};
    const uint64_t(*all)[8] = exchange(mine, 6);
    const int g = current % WARP / 4, t = current % 4;
    const auto half = [](uint64_t pair, int i) { return T::wide(static_cast<uint16_t>(pair >> 16 * i)); };
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const int of = k % 8 / 2, upper = k / 8;
            sum += half(all[row % 8 * 4 + of][2 * upper + row / 8], k % 2) *
                   half(all[column * 4 + of][4 + upper], k % 2);
        }
        c[i] = sum;
    }
}

template <typename T>
uint32_t scaled(uint32_t a, uint32_t offset, uint32_t scale) {
    uint32_t found = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto half = [i](uint32_t pair) { return T::wide(static_cast<uint16_t>(pair >> i)); };
        const float less = T::wide(T::narrow(half(a) - half(offset)));
        found |= static_cast<uint32_t>(T::narrow(less * half(scale))) << i;
    }
    return found;
}

}  // namespace emulated

struct Bf16 {
    static constexpr uint32_t WHOLE = 0x43004300u, EIGHT = 0x43084308u, MINUS = 0xbf80bf80u;
    static float wide(uint16_t value) {
        const uint32_t bits = static_cast<uint32_t>(value) << 16;
        float found;
        std::memcpy(&found, &bits, 4);
        return found;
    }
    static uint16_t narrow(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static constexpr auto mma = emulated::mma<Bf16>;
    static constexpr auto scaled = emulated::scaled<Bf16>;
};

struct Fp16 {
    static constexpr uint32_t WHOLE = 0x64006400u, EIGHT = 0x64086408u, MINUS = 0xbc00bc00u;
    static float wide(uint16_t value) {
        _Float16 found;
        std::memcpy(&found, &value, 2);
        return static_cast<float>(found);
    }
    static uint16_t narrow(float value) {
        const _Float16 half = static_cast<_Float16>(value);
        uint16_t found;
        std::memcpy(&found, &half, 2);
        return found;
    }
    static constexpr auto mma = emulated::mma<Fp16>;
    static constexpr auto scaled = emulated::scaled<Fp16>;
};

extern "C" {
inline __attribute__((used)) void hf_compress_emulated_order(int falling) { emulated::falling = falling; }
inline __attribute__((used)) void hf_compress_emulated_announce(const void* from, long bytes) {
    if (!from) emulated::announced.clear(), emulated::violations = 0;
    else emulated::announced.emplace_back(static_cast<const char*>(from), bytes);
}
inline __attribute__((used)) int hf_compress_emulated_violations() { return emulated::violations; }
}
