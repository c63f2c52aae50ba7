// A few rows of sixteen-bit numbers times a matrix of which two of four inputs have weights, of four bits each, with a
// scale for each group: y = x W^T + bias.
//
// LAYOUT, of compress/sparse/semi.py: of each row `codes`, four bits each, the first the lowest, eight to a word, zero
// being 8; `positions`, two bits each, sixteen to a word; `scale`, sixteen bits, one for each group of inputs. A row is
// filled up to whole groups, and a group is a multiple of 64 inputs, so that all rows begin at multiples of 16 bytes.
//
// THE FLOOR. 2 bits of codes and 1 of positions a weight, and 16 bits for each group: 3.125 of dense's 16 for groups of
// 128, so 5.1 times faster than dense at the same bandwidth.
//
// HOW. As a sum may go in any order, a lane takes 64 inputs that lie together, which are one load of 16 bytes of codes
// and one of 8 of positions for each of its two rows; four lanes take 256 inputs of a row, in whole sectors. Nothing goes
// through shared memory: the next inputs' codes are fetched into registers while these are computed. Two codes become two
// numbers by one exact step: with the bits of 128 (bf16) or 1024 (fp16) before them they are 128 + code, less 136 is the
// code; times the scale, rounded once, is the weight, which is also how `unpack` rounds. Then permuting bytes puts
// them, and zeros, where their positions say: the selector is that of four zeros, changed at two places. Eight warps
// of a block take 256 inputs in turn of one tile of 16 outputs, and add up at the end.
//
// WHAT WAS TRADED. Tensor cores have products with two of four (mma.sp), which would take codes and positions as they
// lie and save the permuting, half of the work; their order of positions over lanes can't be checked without a GPU, and
// spreading needs ordinary products alone. A lane needs about 15 instructions for four weights, 34 weights a cycle on
// each multiprocessor; an H200 could fetch 48. Rows of x are read through L1, 16 bytes of each of 32 places at once.
//
// PREDICTIONS, of times faster than a dense product at 90 % of the bandwidth: 3.4 at one row, 70 % of the bandwidth; 3
// at 16. Not measured.

#include "device.cuh"

namespace {

constexpr int WARPS = 8, RUN = 64, QUAD = 4 * RUN;  // inputs of a lane, and of the four that share a row

struct Matrix {
    const uint32_t* codes;      // (outputs, inputs / 16)
    const uint32_t* positions;  // (outputs, inputs / 32)
    const uint16_t* scale;      // (outputs, inputs / group)
    int outputs, inputs, group;
};

struct Held {  // what a lane has of one of its rows
    uint32_t codes[4], positions[2], scale;

    __device__ __forceinline__ void fetch(const Matrix& m, int row, int input) {
        uint4 four = make_uint4(0, 0, 0, 0);
        uint2 two = make_uint2(0, 0);
        uint32_t one = 0;
        if (row < m.outputs && input < m.inputs) {
            const long at = static_cast<long>(row) * m.inputs + input;
            four = load(reinterpret_cast<const uint4*>(m.codes + at / 16));
            two = load(reinterpret_cast<const uint2*>(m.positions + at / 32));
            one = load(m.scale + static_cast<long>(row) * (m.inputs / m.group) + input / m.group);
        }
        codes[0] = four.x, codes[1] = four.y, codes[2] = four.z, codes[3] = four.w;
        positions[0] = two.x, positions[1] = two.y;
        scale = one | one << 16;
    }

    // The weights of inputs 4 q to 4 q + 3, as two pairs.
    template <typename T>
    __device__ __forceinline__ void spread(int q, uint32_t& low, uint32_t& high) const {
        const uint32_t both = codes[q / 4] >> (8 * (q % 4)), places = positions[q / 8] >> (4 * (q % 8));
        const uint32_t pair = T::scaled((both & 15) | (both & 240) << 12 | T::WHOLE, T::EIGHT, scale);
        // Bytes 0 and 1 of the pair go where the first position says, 2 and 3 where the second does, 4 is of zeros.
        const uint32_t which = 0x44444444u ^ 0x54u << (8 * (places & 3)) ^ 0x76u << (8 * (places >> 2 & 3));
        low = permute(pair, 0, which & 0xffff), high = permute(pair, 0, which >> 16);
    }
};

// x (rows, inputs), zero past those of the matrix; y (rows, outputs).
template <typename T, int TILES>
__global__ void __launch_bounds__(WARPS* LANES) multiply(Matrix m, const uint16_t* x, int all_rows,
                                                         const uint16_t* bias, uint16_t* y) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x, past = blockIdx.y * TILES * BATCH;
    const int rows = min(all_rows - past, TILES * BATCH);
    x += static_cast<long>(past) * m.inputs, y += static_cast<long>(past) * m.outputs;
    float sums[TILES][4] = {};

    Held upper, lower, next_upper, next_lower;
    next_upper.fetch(m, tile * OUTPUTS + g, warp * QUAD + t * RUN);
    next_lower.fetch(m, tile * OUTPUTS + g + 8, warp * QUAD + t * RUN);
    for (int from = warp * QUAD; from < m.inputs; from += WARPS * QUAD) {
        const int input = from + t * RUN;
        upper = next_upper, lower = next_lower;
        next_upper.fetch(m, tile * OUTPUTS + g, input + WARPS * QUAD);
        next_lower.fetch(m, tile * OUTPUTS + g + 8, input + WARPS * QUAD);
#pragma unroll
        for (int q = 0; q < RUN / 4; q += 2) {
            uint32_t a[4], b[4];
            upper.spread<T>(q, a[0], a[1]), upper.spread<T>(q + 1, a[2], a[3]);
            lower.spread<T>(q, b[0], b[1]), lower.spread<T>(q + 1, b[2], b[3]);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const long row = n * BATCH + g;
                uint4 given = make_uint4(0, 0, 0, 0);
                if (row < rows && input < m.inputs)
                    given = load(reinterpret_cast<const uint4*>(x + row * m.inputs + input + 4 * q));
                T::mma(sums[n], a[0], b[0], a[1], b[1], given.x, given.y);
                T::mma(sums[n], a[2], b[2], a[3], b[3], given.z, given.w);
            }
        }
    }
    finish<T, TILES>(sums, tile, rows, m.outputs, nullptr, bias, y);
}

template <typename T>
int run(const Matrix& m, const uint16_t* x, int rows, const uint16_t* bias, uint16_t* y, void* stream) {
    const int tiles = rows > 2 * BATCH ? 4 : rows > BATCH ? 2 : 1;
    const dim3 blocks(ceiling(m.outputs, OUTPUTS), ceiling(rows, tiles * BATCH));
    const auto kernel = tiles == 4 ? multiply<T, 4> : tiles == 2 ? multiply<T, 2> : multiply<T, 1>;
    const int bytes = WARPS * tiles * BATCH * OUTPUTS * static_cast<int>(sizeof(float));
    return launch(kernel, blocks, WARPS * LANES, bytes, stream, m, x, rows, bias, y);
}

}  // namespace

// `half` says whether numbers are fp16, else bf16. x, codes and positions begin at multiples of sixteen bytes.
extern "C" int hf_compress_semi(int device, void* stream, int half, int rows, int outputs, int inputs, int group,
                                const uint16_t* x, const uint32_t* codes, const uint32_t* positions,
                                const uint16_t* scale, const uint16_t* bias, uint16_t* y) {
    if (const int failed = cudaSetDevice(device)) return failed;
    const Matrix m = {codes, positions, scale, outputs, inputs, group};
    return half ? run<Fp16>(m, x, rows, bias, y, stream) : run<Bf16>(m, x, rows, bias, y, stream);
}
