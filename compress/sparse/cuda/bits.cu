// Products with matrices of signs, one bit each: rows of sixteen-bit numbers times signs, signs times signs, and the
// product of whom a token sees, 1 or 0, with signs.
//
// LAYOUT, of compress/bits.py: bits of a row one after another, the first the lowest of its byte, a bit set for 1; rows
// filled up to whole words (to 16 bytes where numbers are multiplied).
//
// NUMBERS TIMES SIGNS, y = scale (x S^T) + bias. The floor is one bit a weight, a sixteenth of dense. A lane takes 128
// inputs of each of two rows, one load of 16 bytes, four lanes 512 inputs of a row. A word's bits j and j + 16 become a
// pair of 1 or -1 by a shift and one logical step: they are the sign bits of a pair of -1, turned. That pairs inputs 16
// apart, so x is paired likewise, by permuting bytes: two steps for four numbers, shared by both rows. About 100
// instructions for 2048 weights, 80 a cycle on each multiprocessor, where an H200 could fetch 152: so it is decoding
// that takes the time. Prediction: 9 times faster than a dense product at 90 % of the bandwidth, one row; at sixteen
// rows reading x takes as long, 5 times. Not measured.
//
// SIGNS TIMES SIGNS, count - 2 popcount(a xor b), and SEEN, 2 popcount(a and b) - popcount(a). A block of 256 threads has
// 64 x 64 results, 4 x 4 a thread, and sixteen words of each row in shared memory, rows 17 apart, so that reading down
// them meets every bank. What bounds it is counting: a multiprocessor counts 16 words a cycle, 512 products, where its
// tensor cores do some 4000 of bf16. So it is for memory, and beats dense where that is bound by reading: a few rows. The
// tensor cores' own products of bits were left: their xor is gone from newer parts. Nothing is measured.

#include "device.cuh"

namespace {

constexpr int WARPS = 8, WORD = 32, RUN = 4 * WORD, QUAD = 4 * RUN;  // inputs of a lane, of the four that share a row

template <typename T>
__device__ __forceinline__ uint32_t turned(uint32_t word, int j) {
    return (word << (15 - j) & 0x80008000u) ^ T::MINUS;
}

// bits (outputs, words), x (rows, 32 words), zero past the inputs of the matrix; y (rows, outputs).
template <typename T, int TILES>
__global__ void __launch_bounds__(WARPS* LANES) signed_sums(const uint32_t* bits, const float* scale, int outputs,
                                                            int words, const uint16_t* x, int all_rows,
                                                            const uint16_t* bias, uint16_t* y) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x, past = blockIdx.y * TILES * BATCH, row = tile * OUTPUTS + g;
    const int rows = min(all_rows - past, TILES * BATCH);
    const long inputs = static_cast<long>(words) * WORD;
    x += past * inputs, y += static_cast<long>(past) * outputs;
    float sums[TILES][4] = {};
    const auto fetch = [&](int output, long input) {
        if (output >= outputs || input >= inputs) return make_uint4(0, 0, 0, 0);
        return load(reinterpret_cast<const uint4*>(bits + static_cast<long>(output) * words + input / WORD));
    };

    uint4 upper = fetch(row, warp * QUAD + t * RUN), lower = fetch(row + 8, warp * QUAD + t * RUN);
    for (long from = warp * QUAD; from < inputs; from += WARPS * QUAD) {
        const long input = from + t * RUN;
        const uint32_t above[4] = {upper.x, upper.y, upper.z, upper.w};
        const uint32_t under[4] = {lower.x, lower.y, lower.z, lower.w};
        upper = fetch(row, input + WARPS * QUAD), lower = fetch(row + 8, input + WARPS * QUAD);
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                uint4 first[2], second[2];  // inputs 0 to 15 of the word, and 16 to 31
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    first[i] = second[i] = make_uint4(0, 0, 0, 0);
                    if (n * BATCH + g < rows && input < inputs) {
                        const uint16_t* here = x + (n * BATCH + g) * inputs + input + w * WORD + 8 * i;
                        first[i] = load(reinterpret_cast<const uint4*>(here));
                        second[i] = load(reinterpret_cast<const uint4*>(here + 16));
                    }
                }
                const uint32_t low[8] = {first[0].x, first[0].y, first[0].z, first[0].w,
                                         first[1].x, first[1].y, first[1].z, first[1].w};
                const uint32_t high[8] = {second[0].x, second[0].y, second[0].z, second[0].w,
                                          second[1].x, second[1].y, second[1].z, second[1].w};
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    T::mma(sums[n], turned<T>(above[w], 2 * i), turned<T>(under[w], 2 * i),
                           turned<T>(above[w], 2 * i + 1), turned<T>(under[w], 2 * i + 1),
                           permute(low[i], high[i], 0x5410), permute(low[i], high[i], 0x7632));
            }
    }
    finish<T, TILES>(sums, tile, rows, outputs, scale, bias, y);
}

template <typename T>
int run(const uint32_t* bits, const float* scale, int outputs, int words, const uint16_t* x, int rows,
        const uint16_t* bias, uint16_t* y, void* stream) {
    const int tiles = rows > BATCH ? 2 : 1;
    const dim3 blocks(ceiling(outputs, OUTPUTS), ceiling(rows, tiles * BATCH));
    const int bytes = WARPS * tiles * BATCH * OUTPUTS * static_cast<int>(sizeof(float));
    return launch(tiles == 2 ? signed_sums<T, 2> : signed_sums<T, 1>, blocks, WARPS * LANES, bytes, stream, bits, scale,
                  outputs, words, x, rows, bias, y);
}

constexpr int SIDE = 64, EACH = 4, ACROSS = SIDE / EACH, DEEP = 16, APART = DEEP + 1;

// a (batch, m, words), b (batch, n, words), y (batch, m, n).
template <bool SEEN>
__global__ void __launch_bounds__(ACROSS* ACROSS) counted(const uint32_t* a, const uint32_t* b, int m, int n, int words,
                                                          float count, float* y) {
    uint32_t* left = reinterpret_cast<uint32_t*>(shared_memory());
    uint32_t* right = left + SIDE * APART;
    const int down = threadIdx.x / ACROSS, across = threadIdx.x % ACROSS;
    const int first_row = blockIdx.y * SIDE, first_column = blockIdx.x * SIDE;
    a += static_cast<long>(blockIdx.z) * m * words, b += static_cast<long>(blockIdx.z) * n * words;
    y += static_cast<long>(blockIdx.z) * m * n;
    int sums[EACH][EACH] = {}, seen[EACH] = {};
    for (int from = 0; from < words; from += DEEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * DEEP; i += ACROSS * ACROSS) {
            const int row = i / DEEP, word = from + i % DEEP;
            const bool in_a = first_row + row < m && word < words, in_b = first_column + row < n && word < words;
            left[row * APART + i % DEEP] = in_a ? load(a + static_cast<long>(first_row + row) * words + word) : 0;
            right[row * APART + i % DEEP] = in_b ? load(b + static_cast<long>(first_column + row) * words + word) : 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int word = 0; word < DEEP; ++word) {
            uint32_t rows[EACH], columns[EACH];
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                rows[i] = left[(down + ACROSS * i) * APART + word];
                columns[i] = right[(across + ACROSS * i) * APART + word];
                if (SEEN) seen[i] += __popc(rows[i]);
            }
#pragma unroll
            for (int i = 0; i < EACH; ++i)
#pragma unroll
                for (int j = 0; j < EACH; ++j)
                    sums[i][j] += __popc(SEEN ? rows[i] & columns[j] : rows[i] ^ columns[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int row = first_row + down + ACROSS * i, column = first_column + across + ACROSS * j;
            if (row < m && column < n)
                y[static_cast<long>(row) * n + column] = SEEN ? 2.0f * sums[i][j] - seen[i] : count - 2.0f * sums[i][j];
        }
}

}  // namespace

// `half` says whether numbers are fp16, else bf16. x and bits begin at multiples of sixteen bytes; words are fours.
extern "C" int hf_compress_signs_linear(int device, void* stream, int half, int rows, int outputs, int words,
                                        const uint16_t* x, const uint32_t* bits, const float* scale,
                                        const uint16_t* bias, uint16_t* y) {
    if (const int failed = cudaSetDevice(device)) return failed;
    return half ? run<Fp16>(bits, scale, outputs, words, x, rows, bias, y, stream)
                : run<Bf16>(bits, scale, outputs, words, x, rows, bias, y, stream);
}

// `seen` says whether a is 1 or 0, else signs, of which each row has `count`.
extern "C" int hf_compress_counted(int device, void* stream, int seen, int batch, int m, int n, int words, int count,
                                   const uint32_t* a, const uint32_t* b, float* y) {
    if (const int failed = cudaSetDevice(device)) return failed;
    const dim3 blocks(ceiling(n, SIDE), ceiling(m, SIDE), batch);
    const int bytes = 2 * SIDE * APART * static_cast<int>(sizeof(uint32_t));
    return launch(seen ? counted<true> : counted<false>, blocks, ACROSS * ACROSS, bytes, stream, a, b, m, n, words,
                  static_cast<float>(count), y);
}
