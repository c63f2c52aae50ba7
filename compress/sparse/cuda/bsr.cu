// Many rows of sixteen-bit numbers times a matrix of which whole square tiles are zero: y = x W^T + bias.
//
// LAYOUT, of compress/sparse/bsr.py: `tiles` (tiles, side, side) that aren't all zero, those of a row of tiles one after
// another; `places`, the column of tiles of each; `starts`, where each row's begin; `order`, rows with most tiles first.
// Sides are 16, 32 or 64. x is filled up with zeros to whole tiles, so that every copy is of sixteen bytes.
//
// THE FLOOR. With few rows of x it is fetching the tiles, a share d of dense's bytes. This kernel is for many, where it is
// multiplying: a share d of dense's products. Between stands what L2 must give: a block that computes R rows of x by
// `side` outputs reads R + side numbers for each R side products, 128 + 64 for 8192 at best, where a dense product
// of 128 x 256 results reads half as much for each. Tiles of 16 read six times as much as those of 64.
//
// HOW. A block has a row of tiles and 64 or 128 rows of x. A step is 64 inputs that are stored: a tile of 64, two of 32
// or four of 16, whichever come next, and the same columns of x; both are copied by cp.async to shared memory, three
// steps in flight. So all sides run through the same loop, and none loads an x that meets zeros alone. Each of four warps
// has a quarter of the rows and all outputs. As a sum may go in any order, a lane reads sixteen bytes of a row at once,
// which are its part of two products of 16 x 8 x 16; x is A, so that a lane stores two neighbours of y. Chunks of
// sixteen bytes of odd rows are exchanged, four by four, so that eight lanes that read two rows meet all banks. Rows of
// tiles with most work start first; each block takes the next when one is done, as the hardware hands them out.
//
// WHAT WAS TRADED. Hopper's own products (wgmma) give more than the mma of 8.0 that is used here, which reaches about six
// tenths of its peak; but L2 bounds a tile of 64 before that does, and one source serves both. Rows of tiles that share
// columns could share x, which would be a second format. Blocks of 256 rows would read a sixth less, and leave one on
// a multiprocessor. Few rows of x waste what tensor cores compute, none of what is fetched.
//
// PREDICTIONS, of an H200 whose L2 gives 25 bytes a cycle to each multiprocessor, against dense at 700 TFLOP/s: 250, 150
// and 80 TFLOP/s of what is stored with sides of 64, 32 and 16 at 128 rows and more; so even at densities of 0.35, 0.2
// and 0.11, and 1.7, 1.05 and 0.6 times faster at 0.2. Not measured.

#include "device.cuh"

namespace {

constexpr int WARPS = 4, STEP = 64, CHUNK = 8, CHUNKS = STEP / CHUNK, STAGES = 3;  // CHUNK numbers are sixteen bytes
constexpr int TOGETHER = WARPS * LANES / CHUNKS;                                   // rows that all lanes copy at once

struct Matrix {
    const int *order, *starts, *places;
    const uint16_t* tiles;
    int outputs, width;
};

// Where a chunk of a row lies in shared memory, in numbers.
__device__ __forceinline__ int put(int row, int chunk) { return row * STEP + (chunk ^ (row & 1) << 2) * CHUNK; }

// x (rows, width); y (rows, outputs). A warp has 16 TALL rows of x.
template <typename T, int SIDE, int TALL>
__global__ void __launch_bounds__(WARPS* LANES) multiply(Matrix m, const uint16_t* x, int all_rows,
                                                         const uint16_t* bias, uint16_t* y) {
    constexpr int ROWS = WARPS * TALL * 16, EACH = STEP / SIDE, WIDE = SIDE / BATCH;  // tiles of a step; mma across
    constexpr int HELD = (ROWS + SIDE) * STEP;                                        // numbers of a stage
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int row_of_tiles = load(m.order + blockIdx.x), past = blockIdx.y * ROWS;
    const int begin = load(m.starts + row_of_tiles), tiles = load(m.starts + row_of_tiles + 1) - begin;
    const int steps = (tiles + EACH - 1) / EACH;
    uint16_t* stages = reinterpret_cast<uint16_t*>(shared_memory());

    // What this lane copies of each step: a chunk of one tile of it, of some rows.
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const int part = chunk * CHUNK / SIDE, within = chunk * CHUNK % SIDE;
    const auto place_of = [&](int step) {
        const int tile = step * EACH + part;
        return tile < tiles ? load(m.places + begin + tile) : -1;
    };
    const auto stage = [&](int step, int place) {
        uint16_t* to = stages + step % STAGES * HELD;
        const int there = place < 0 ? 0 : 16;  // past the last tile are zeros
        const long column = place < 0 ? 0 : static_cast<long>(place) * SIDE + within;
        const long tile = place < 0 ? 0 : static_cast<long>(begin) + step * EACH + part;
#pragma unroll
        for (int row = first; row < ROWS; row += TOGETHER) {
            const bool inside = past + row < all_rows;
            const uint16_t* from = x + (inside ? static_cast<long>(past + row) * m.width + column : 0);
            copy16(to + put(row, chunk), from, inside ? there : 0);
        }
#pragma unroll
        for (int row = first; row < SIDE; row += TOGETHER)
            copy16(to + ROWS * STEP + put(row, chunk), m.tiles + (tile * SIDE + row) * SIDE + (there ? within : 0), there);
    };

    float sums[TALL][WIDE][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) stage(step, place_of(step));
        commit();
    }
    int next = place_of(STAGES - 1);
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();  // this step is there, and nobody reads the one before
        if (step + STAGES - 1 < steps) stage(step + STAGES - 1, next);
        commit();
        next = place_of(step + STAGES);
        const uint16_t* of_x = stages + step % STAGES * HELD;
        const uint16_t* of_w = of_x + ROWS * STEP;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 upper[TALL], lower[TALL];
#pragma unroll
            for (int i = 0; i < TALL; ++i) {
                const int row = (warp * TALL + i) * 16 + g;
                upper[i] = *reinterpret_cast<const uint4*>(of_x + put(row, half * 4 + t));
                lower[i] = *reinterpret_cast<const uint4*>(of_x + put(row + 8, half * 4 + t));
            }
#pragma unroll
            for (int n = 0; n < WIDE; ++n) {
                const uint4 w = *reinterpret_cast<const uint4*>(of_w + put(n * BATCH + g, half * 4 + t));
#pragma unroll
                for (int i = 0; i < TALL; ++i) {
                    T::mma(sums[i][n], upper[i].x, lower[i].x, upper[i].y, lower[i].y, w.x, w.y);
                    T::mma(sums[i][n], upper[i].z, lower[i].z, upper[i].w, lower[i].w, w.z, w.w);
                }
            }
        }
    }
    wait<0>();
#pragma unroll
    for (int i = 0; i < TALL; ++i)
#pragma unroll
        for (int n = 0; n < WIDE; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = past + (warp * TALL + i) * 16 + g + j / 2 * 8;
                const int output = row_of_tiles * SIDE + n * BATCH + 2 * t + j % 2;
                if (row >= all_rows || output >= m.outputs) continue;
                const float sum = sums[i][n][j] + (bias ? T::wide(load(bias + output)) : 0);
                y[static_cast<long>(row) * m.outputs + output] = T::narrow(sum);
            }
}

template <typename T, int SIDE, int TALL>
int start(const Matrix& m, const uint16_t* x, int rows, const uint16_t* bias, uint16_t* y, void* stream) {
    constexpr int ROWS = WARPS * TALL * 16;
    const dim3 blocks(ceiling(m.outputs, SIDE), ceiling(rows, ROWS));
    const int bytes = STAGES * (ROWS + SIDE) * STEP * static_cast<int>(sizeof(uint16_t));
    return launch(multiply<T, SIDE, TALL>, blocks, WARPS * LANES, bytes, stream, m, x, rows, bias, y);
}

template <typename T, int SIDE>
int sized(const Matrix& m, const uint16_t* x, int rows, const uint16_t* bias, uint16_t* y, void* stream) {
    return rows > WARPS * 16 ? start<T, SIDE, 2>(m, x, rows, bias, y, stream)
                             : start<T, SIDE, 1>(m, x, rows, bias, y, stream);
}

template <typename T>
int run(int side, const Matrix& m, const uint16_t* x, int rows, const uint16_t* bias, uint16_t* y, void* stream) {
    if (side == 64) return sized<T, 64>(m, x, rows, bias, y, stream);
    if (side == 32) return sized<T, 32>(m, x, rows, bias, y, stream);
    return sized<T, 16>(m, x, rows, bias, y, stream);
}

}  // namespace

// `half` says whether numbers are fp16, else bf16. x and tiles begin at multiples of sixteen bytes.
extern "C" int hf_compress_bsr(int device, void* stream, int half, int rows, int outputs, int width, int side,
                               const uint16_t* x, const int* order, const int* starts, const int* places,
                               const uint16_t* tiles, const uint16_t* bias, uint16_t* y) {
    if (const int failed = cudaSetDevice(device)) return failed;
    const Matrix m = {order, starts, places, tiles, outputs, width};
    return half ? run<Fp16>(side, m, x, rows, bias, y, stream) : run<Bf16>(side, m, x, rows, bias, y, stream);
}
