// A few rows of sixteen-bit numbers times a matrix of single weights with a bit for each: y = x W^T + bias.
//
// LAYOUT. That of compress/sparse/formats.py, the same that the CPU reads: `bits` (outputs, words) of 32 inputs each,
// `values` of all rows one after another, and where each row's begin. So one file serves both, and nothing is packed anew
// when a model moves to the GPU. Where the value of a bit lies is the count of bits before it in its row.
//
// THE FLOOR. With few rows of x, time is that of fetching the matrix: 1 + 16 d bits a weight at density d, 9/16 of dense
// at one half. Rows of x come from L1 and L2. Sixteen rows of x share one fetch; more are done by sixteens, and then a
// dense product is faster anyway.
//
// HOW. Products go to the tensor cores, which give up to sixteen rows for the price of one. A warp has sixteen outputs;
// the four warps of a block take turns at segments of 256 inputs and add up at the end. For a segment a warp has, of
// each of its sixteen rows, eight words of bits and up to 256 values, of which two lanes copy what there is, sixteen
// bytes at a time, by cp.async to shared memory; the copies of one segment are under way while the segment before is
// computed, and the bits are fetched one segment further ahead, since the counts tell where values lie. Each warp counts
// the bits of all four segments of a turn, as it must know where its own begins; the four read the same lines.
//
// Of each word, the four lanes of a row take a byte each: eight inputs, two of each pair that the fragments of two mma
// want. A lane finds its first value by counting the bits below its byte, and takes the next for each bit that is set:
// a predicated load of sixteen bits from shared memory. A row's stretch is 528 bytes: 256 values, and up to seven that
// belong to what lies before, as copies begin at multiples of sixteen bytes. 528 = 4 (mod 128), so rows begin in
// different banks.
//
// WHAT WAS TRADED. Decoding costs the same at any density: about 97 instructions and 42 cycles of shared memory (at one
// half, two lanes in a bank) for the 512 weights of a step, so about 12 weights a cycle on each multiprocessor, where
// copying from memory as fast as an H200 can would want 17 at density 0.5 and 55 at 0.1. A layout of its own, with the
// streams of lanes interleaved, would avoid half of the loads, and would be a second format. Inputs aren't split between
// blocks: that needs a second kernel, and helps matrices alone that take a few microseconds. Matrices of fewer than 16 x
// 264 outputs therefore don't fill the card.
//
// PREDICTIONS, of times faster than a dense product at 90 % of the bandwidth, one row: 1.4 at density 0.5, 2 at 0.3, 3 at
// 0.1; 70 %, 55 % and 30 % of the bandwidth; the same within a tenth to sixteen rows. Not measured.

#include "device.cuh"

namespace {

constexpr int WORD = 32, WARPS = 4, WORDS = 8;  // bits; warps in a block; words of a row in a segment
constexpr int SEGMENT = WORD * WORDS;
constexpr int STRETCH = SEGMENT * 2 + 16;  // bytes of a row's values in a segment, and what lies before in their sixteen

struct Stage {  // what a warp has of a segment
    unsigned char values[OUTPUTS][STRETCH];
    uint32_t bits[OUTPUTS][WORDS + 1];  // one more, so that rows begin in different banks
    int first[OUTPUTS];                 // where in its stretch a row's values begin
};

struct Matrix {
    const uint32_t* bits;
    const int* starts;
    const uint16_t* values;
    long entries;
    int outputs, words;
    bool wide;  // four words at a time can be read
};

// The words that a lane sees of the segments of a turn: its half of each, of its row.
struct Seen {
    uint32_t word[WARPS][4];

    __device__ __forceinline__ void fetch(const Matrix& m, int row, int half, int turn) {
#pragma unroll
        for (int s = 0; s < WARPS; ++s) {
            const int at = (turn * WARPS + s) * WORDS + half * 4;
            const uint32_t* from = m.bits + static_cast<long>(row) * m.words + at;
            uint4 four = make_uint4(0, 0, 0, 0);
            if (row < m.outputs && m.wide && at < m.words) four = load(reinterpret_cast<const uint4*>(from));
            if (row < m.outputs && !m.wide) {
                if (at < m.words) four.x = load(from);
                if (at + 1 < m.words) four.y = load(from + 1);
                if (at + 2 < m.words) four.z = load(from + 2);
                if (at + 3 < m.words) four.w = load(from + 3);
            }
            word[s][0] = four.x, word[s][1] = four.y, word[s][2] = four.z, word[s][3] = four.w;
        }
    }
};

// Begins to copy a warp's segment of a turn, and moves `begin` on to the next turn's values.
__device__ __forceinline__ void stage(const Matrix& m, const Seen& seen, Stage& to, int warp, int lane, long& begin) {
    const int row = lane / 2, half = lane % 2;
    int before = 0, own = 0, all = 0;
#pragma unroll
    for (int s = 0; s < WARPS; ++s) {
        int count = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) count += __popc(seen.word[s][j]);
        count += __shfl_xor_sync(0xffffffffu, count, 1);
        if (s < warp) before += count;
        all += count;
        if (s == warp) {
            own = count;
#pragma unroll
            for (int j = 0; j < 4; ++j) to.bits[row][half * 4 + j] = seen.word[s][j];
        }
    }
    const long from = (begin + before) * 2, aligned = from & ~15l, end = from + own * 2;
    if (half == 0) to.first[row] = static_cast<int>(from - aligned) / 2;
    for (long at = aligned + half * 16; at < end; at += 32) {
        const long left = m.entries * 2 - at;
        copy16(to.values[row] + (at - aligned), reinterpret_cast<const unsigned char*>(m.values) + at,
               left < 16 ? static_cast<int>(left) : 16);
    }
    begin += all;
}

// The weights of eight inputs as pairs, those without a bit zero.
__device__ __forceinline__ void spread(uint32_t bits, const uint16_t* next, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t low = 0, high = 0;
        if (bits >> (2 * i) & 1) low = *next++;
        if (bits >> (2 * i + 1) & 1) high = *next++;
        pairs[i] = low | high << 16;
    }
}

// x (rows, 32 words), its inputs past those of the matrix zero; y (rows, outputs).
template <typename T, int TILES>
__global__ void __launch_bounds__(WARPS* LANES) multiply(Matrix m, const uint16_t* x, int all_rows,
                                                         const uint16_t* bias, uint16_t* y) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x, past = blockIdx.y * TILES * BATCH;
    const int rows = min(all_rows - past, TILES * BATCH);
    const long width = static_cast<long>(m.words) * WORD;
    x += past * width, y += static_cast<long>(past) * m.outputs;
    Stage* stages = reinterpret_cast<Stage*>(shared_memory()) + 2 * warp;

    const int own_row = tile * OUTPUTS + lane / 2;
    long begin = own_row < m.outputs ? load(m.starts + own_row) : 0;
    const int turns = (m.words + WARPS * WORDS - 1) / (WARPS * WORDS);
    float sums[TILES][4] = {};

    Seen seen;
    seen.fetch(m, own_row, lane % 2, 0);
    stage(m, seen, stages[0], warp, lane, begin);
    commit();
    seen.fetch(m, own_row, lane % 2, 1);
    for (int turn = 0; turn < turns; ++turn) {
        if (turn + 1 < turns) {
            stage(m, seen, stages[(turn + 1) % 2], warp, lane, begin);
            seen.fetch(m, own_row, lane % 2, turn + 2);
        }
        commit();
        wait<1>();
        __syncwarp();
        const Stage& now = stages[turn % 2];
        const uint16_t* upper = reinterpret_cast<const uint16_t*>(now.values[g]) + now.first[g];
        const uint16_t* lower = reinterpret_cast<const uint16_t*>(now.values[g + 8]) + now.first[g + 8];
        const int from = (turn * WARPS + warp) * WORDS;
        const uint32_t below = (1u << (8 * t)) - 1;
        for (int w = 0; w < WORDS && from + w < m.words; ++w) {
            const uint32_t above = now.bits[g][w], under = now.bits[g + 8][w];
            uint32_t a[4], b[4];
            spread(above >> (8 * t) & 255, upper + __popc(above & below), a);
            spread(under >> (8 * t) & 255, lower + __popc(under & below), b);
            upper += __popc(above), lower += __popc(under);
#pragma unroll
            for (int q = 0; q < TILES; ++q) {
                uint4 given = make_uint4(0, 0, 0, 0);
                if (q * BATCH + g < rows)
                    given = load(reinterpret_cast<const uint4*>(x + (q * BATCH + g) * width + (from + w) * WORD + 8 * t));
                T::mma(sums[q], a[0], b[0], a[1], b[1], given.x, given.y);
                T::mma(sums[q], a[2], b[2], a[3], b[3], given.z, given.w);
            }
        }
        __syncwarp();
    }
    wait<0>();
    finish<T, TILES>(sums, tile, rows, m.outputs, nullptr, bias, y);
}

template <typename T>
int run(const Matrix& m, const uint16_t* x, int rows, const uint16_t* bias, uint16_t* y, void* stream) {
    const int tiles = rows > BATCH ? 2 : 1;
    const dim3 blocks(ceiling(m.outputs, OUTPUTS), ceiling(rows, tiles * BATCH));
    return launch(tiles == 2 ? multiply<T, 2> : multiply<T, 1>, blocks, WARPS * LANES,
                  static_cast<int>(sizeof(Stage)) * 2 * WARPS, stream, m, x, rows, bias, y);
}

}  // namespace

// `half` says whether numbers are fp16, else bf16. x and values begin at multiples of sixteen bytes.
extern "C" int hf_compress_bitmap(int device, void* stream, int half, int rows, int outputs, int words, long entries,
                                  const uint16_t* x, const uint32_t* bits, const int* starts, const uint16_t* values,
                                  const uint16_t* bias, uint16_t* y) {
    if (const int failed = cudaSetDevice(device)) return failed;
    const bool wide = words % 4 == 0 && reinterpret_cast<uintptr_t>(bits) % 16 == 0;
    const Matrix m = {bits, starts, values, entries, outputs, words, wide};
    return half ? run<Fp16>(m, x, rows, bias, y, stream) : run<Bf16>(m, x, rows, bias, y, stream);
}
