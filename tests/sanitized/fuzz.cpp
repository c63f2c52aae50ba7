// Products of random matrices by every path, beside the plain sums; built with sanitizers by tests/test_sanitized.py.
// Every array has exactly the size that the kernels may read, so that one step too far is seen.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../compress/sparse/kernels/sparse.h"

template <typename T>
struct Exact {  // a copy on the heap of just this size
    std::unique_ptr<T[]> held;
    explicit Exact(const std::vector<T>& from) : held(new T[from.size()]) { std::copy(from.begin(), from.end(), held.get()); }
    T* get() const { return held.get(); }
};

static std::mt19937 generator(0);
static int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
static float number() { return std::normal_distribution<float>()(generator); }

static const Runner run = [](long parts, const std::function<void(long)>& part) {
    for (long i = parts; i-- > 0;) part(i);  // in another order than a loop would take
};

static bool near(const Exact<float>& met, const std::vector<float>& expected, float tolerance) {
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(std::fabs(met.get()[i] - expected[i]) <= tolerance * (1 + std::fabs(expected[i])))) return false;
    return true;
}

static bool bitmap(long rows, long inputs, long outputs, double density) {
    const long words = ceiling(inputs, 32);
    std::vector<uint32_t> bits(outputs * words);
    std::vector<int32_t> starts{0};
    std::vector<float> values, x(rows * inputs), bias(outputs), expected(rows * outputs), halved(rows * outputs);
    std::vector<uint16_t> halves;
    for (auto& one : x) one = number();
    for (auto& one : bias) one = number();
    for (long n = 0; n < outputs; ++n) {
        for (long r = 0; r < rows; ++r) expected[r * outputs + n] = halved[r * outputs + n] = bias[n];
        for (long k = 0; k < inputs; ++k)
            if (std::uniform_real_distribution<>()(generator) < density) {
                bits[n * words + k / 32] |= 1u << k % 32;
                values.push_back(number());
                uint32_t word;
                std::memcpy(&word, &values.back(), 4);
                halves.push_back(word >> 16);
                word &= 0xffff0000;
                float half;
                std::memcpy(&half, &word, 4);
                for (long r = 0; r < rows; ++r) {
                    expected[r * outputs + n] += values.back() * x[r * inputs + k];
                    halved[r * outputs + n] += half * x[r * inputs + k];
                }
            }
        starts.push_back(values.size());
    }
    const Exact<uint32_t> b(bits);
    const Exact<int32_t> s(starts);
    const Exact<float> v(values), given(x), added(bias);
    const Exact<uint16_t> h(halves);
    for (int path = PLAIN; path <= best_path(); ++path)
        for (bool half : {false, true}) {
            Exact<float> y(std::vector<float>(rows * outputs, NAN));
            const void* stored = half ? static_cast<const void*>(h.get()) : v.get();
            multiply({given.get(), y.get(), added.get(), rows, inputs, outputs},
                     Bitmap{b.get(), s.get(), stored, half, static_cast<long>(values.size())}, static_cast<Path>(path), run);
            if (!near(y, half ? halved : expected, 1e-3f)) return false;
        }
    return true;
}

static bool blocks(long rows, long inputs, long outputs, double density) {
    const long slots = rounded_up(outputs, 4), places = ceiling(inputs, 4);
    std::vector<int32_t> order(slots), starts{0}, sums(outputs);
    std::vector<uint16_t> at;
    std::vector<int8_t> codes;
    std::vector<float> x(rows * inputs), bias(outputs), scale(outputs), expected;
    for (auto& one : x) one = number();
    for (auto& one : bias) one = number();
    for (auto& one : scale) one = 0.01f;
    for (long i = 0; i < slots; ++i) order[i] = i ^ (i / 64 * 64 == (slots - 1) / 64 * 64 ? 0 : 1);
    for (long four = 0; four < slots / 4; ++four) {
        const long length = std::lround(places * density);
        for (long e = 0; e < length; ++e)
            for (int i = 0; i < 4; ++i) {
                const long n = order[four * 4 + i], place = std::min(places - 1, e * places / length + draw(0, 1));
                at.push_back(place);
                for (int j = 0; j < 4; ++j) {
                    codes.push_back(n < outputs && place * 4 + j < inputs ? draw(-127, 127) : 0);
                    if (n < outputs) sums[n] += codes.back();
                }
            }
        starts.push_back(at.size() / 4);
    }
    const Exact<int32_t> o(order), s(starts), u(sums);
    const Exact<uint16_t> p(at);
    const Exact<int8_t> c(codes);
    const Exact<float> given(x), added(bias), factor(scale);
    const Blocks matrix{o.get(), s.get(), p.get(), c.get(), factor.get(), u.get()};
    const FewRows few(matrix, inputs, outputs);
    for (int path = PLAIN; path <= best_path() + 1; ++path) {
        Exact<float> y(std::vector<float>(rows * outputs, NAN));
        const Product product{given.get(), y.get(), added.get(), rows, inputs, outputs};
        if (path <= best_path())
            multiply(product, matrix, static_cast<Path>(path), run);
        else if (best_path() == WITH_AVX512 && rows <= FewRows::MOST)
            multiply(product, matrix, few, run);
        else
            continue;
        if (path == PLAIN) expected.assign(y.get(), y.get() + rows * outputs);
        for (float one : expected)
            if (!std::isfinite(one)) return false;
        if (std::memcmp(expected.data(), y.get(), expected.size() * sizeof(float)) != 0) return false;
    }
    return true;
}

int main(int, char** given) {
    for (int round = std::atoi(given[1]); round-- > 0;) {
        const long rows = draw(1, draw(0, 1) ? 40 : 9), inputs = draw(1, 200), outputs = draw(1, 150);
        const double density = draw(0, 4) / 4.0;
        if (bitmap(rows, inputs, outputs, density) && blocks(rows, inputs, outputs, density)) continue;
        std::printf("wrong: %ld rows, %ld inputs, %ld outputs, density %g\n", rows, inputs, outputs, density);
        return 1;
    }
    std::puts("all right");
}
