// How rows of float32 become unsigned bytes:  x ~ step (byte - zero).

#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "sparse.h"

// Bytes of a row, its step and its zero. A row that has a number that isn't finite becomes NaN.
INLINE void round_row(const float* x, long inputs, uint8_t* bytes, float& step, int32_t& zero) {
    constexpr int WIDE = 32;
    float high[WIDE] = {}, low[WIDE] = {};
    int32_t strange[WIDE] = {};
    long k = 0;
    for (; k + WIDE <= inputs; k += WIDE)
        for (int j = 0; j < WIDE; ++j) {
            const float value = x[k + j];
            high[j] = value > high[j] ? value : high[j];
            low[j] = value < low[j] ? value : low[j];
            strange[j] |= !(std::fabs(value) <= FLT_MAX);
        }
    for (; k < inputs; ++k) {
        high[0] = x[k] > high[0] ? x[k] : high[0];
        low[0] = x[k] < low[0] ? x[k] : low[0];
        strange[0] |= !(std::fabs(x[k]) <= FLT_MAX);
    }
    for (int j = 1; j < WIDE; ++j) {
        high[0] = high[j] > high[0] ? high[j] : high[0];
        low[0] = low[j] < low[0] ? low[j] : low[0];
        strange[0] |= strange[j];
    }
    if (strange[0]) {
        std::memset(bytes, 0, inputs);
        step = std::numeric_limits<float>::quiet_NaN();
        zero = 0;
        return;
    }
    constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
    step = high[0] / 255 - low[0] / 255;
    step = step > 1e-30f ? step : 1e-30f;
    const float inverse = 1 / step, shift = (-low[0] * inverse + NEAREST) - NEAREST;
    zero = static_cast<int32_t>(shift);
    for (k = 0; k < inputs; ++k) {
        float code = ((x[k] * inverse + NEAREST) - NEAREST) + shift;
        code = code < 255 ? code : 255;
        bytes[k] = static_cast<uint8_t>(static_cast<int32_t>(code > 0 ? code : 0));
    }
}
