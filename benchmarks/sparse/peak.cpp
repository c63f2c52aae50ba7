// What one core does at most: products of bytes and of floats in registers, billions of operations a second.

#include <chrono>
#include <cstdio>

template <typename F>
static double best(F once, double operations) {
    double found = 0;
    for (int i = 0; i < 20; ++i) {
        const auto start = std::chrono::steady_clock::now();
        once();
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (operations / seconds > found) found = operations / seconds;
    }
    return found / 1e9;
}

#define TWELVE(OP) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11) OP(12) OP(13)
#define BYTES(N) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #N "\n"
#define FLOATS(N) "vfmadd231ps %%zmm0, %%zmm1, %%zmm" #N "\n"

#define REPEAT(OP) \
    for (long i = 0; i < TIMES; ++i)  \
        asm volatile(TWELVE(OP) ::: "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
                     "xmm12", "xmm13")

int main() {
    constexpr long TIMES = 1000000;
    const double bytes = best([] { REPEAT(BYTES); }, TIMES * 12.0 * 128);
    const double floats = best([] { REPEAT(FLOATS); }, TIMES * 12.0 * 32);
    std::printf("%.1f %.1f\n", bytes, floats);
}
