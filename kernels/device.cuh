// Everything that only the device has, behind plain functions: the kernels use nothing else. On the
// host tests/simt/device_host.h stands in for it, so that the same sources run without a device.
//
// Notation of mma fragments: lane = 4 · g + q, g < 8, q < 4. Of a 16 × 16 operand A a lane holds
// rows g and g + 8 at k = 2q, 2q + 1 and 2q + 8, 2q + 9; of a 16 × 8 operand B column g at these k;
// of a 16 × 8 accumulator rows g and g + 8 at columns 2q, 2q + 1.
#pragma once

#include <stdint.h>

// Sixteen bytes that travel in one access.
struct alignas(16) Chunk {
    uint32_t v[4];
};

struct alignas(8) FloatPair {
    float low, high;
};

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// Threads of a block, and blocks that share a multiprocessor at least. The driver may start a kernel
// while the one before it ends. Before wait_for_the_one_before() this one may read what belongs to its
// plan, which nothing writes, and nothing else; and no block may end before one of its threads waited.
#define KERNEL_THAT_WAITS(name, Params, threads, blocks)                                           \
    DEVICE void name##_body(const Params &p);                                                      \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                  \
        name(const __grid_constant__ Params p) {                                                   \
        name##_body(p);                                                                            \
    }                                                                                              \
    DEVICE void name##_body(const Params &p)

// Until the kernel before has ended. The next may start from then on and no sooner: it finds that of
// two kernels before it the first has ended, as without overlaps.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900
DEVICE void wait_for_the_one_before() {}
#else
DEVICE void wait_for_the_one_before() {
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
}
#endif

DEVICE uint32_t thread_index() { return threadIdx.x; }
DEVICE uint32_t block_index() { return blockIdx.x; }
DEVICE uint32_t block_count() { return gridDim.x; }

// The dynamic shared memory of the block.
DEVICE unsigned char *shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

DEVICE void sync_block() { __syncthreads(); }
// A barrier as well.
DEVICE bool any_in_block(bool x) { return __syncthreads_or(x); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
// Bit i: what lane i says.
DEVICE uint32_t vote_in_warp(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE uint32_t sum_in_warp(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE uint32_t count_bits(uint32_t x) { return __popc(x); }
DEVICE uint32_t shuffle_xor(uint32_t x, uint32_t lanes) {
    return __shfl_xor_sync(0xffffffffu, x, lanes);
}
DEVICE double shuffle_xor(double x, uint32_t lanes) {
    return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// Never contracted to fused operations.
DEVICE float add_rn(float x, float y) { return __fadd_rn(x, y); }
DEVICE float mul_rn(float x, float y) { return __fmul_rn(x, y); }
DEVICE double add_rn(double x, double y) { return __dadd_rn(x, y); }
DEVICE double mul_rn(double x, double y) { return __dmul_rn(x, y); }

// x · y + z, rounded once.
DEVICE float fma_rn(float x, float y, float z) { return __fmaf_rn(x, y, z); }

DEVICE float float_of_bits(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
DEVICE double double_of_bits(uint64_t x) { return __longlong_as_double((long long)x); }
DEVICE uint64_t bits_of_double(double x) { return (uint64_t)__double_as_longlong(x); }

// To the nearest pair, ties to even: the first in the low half.
DEVICE uint32_t round_to_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE uint32_t round_to_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE float float_of_f16(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// c += a · b: m16n8k16, bf16 products, f32 sums that are cut off, not rounded.
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 × 8 matrices of 16-bit elements; lane l gives row l % 8 of matrix l / 8.
DEVICE void ldmatrix(uint32_t (&r)[4], const unsigned char *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const unsigned char *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies `bytes` of sixteen and zeros the rest, some time before the wait that covers it.
DEVICE void copy_async(unsigned char *shared, const unsigned char *global, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups of this thread but the N latest have arrived.
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "device_host.h"
#endif

// One that waits at once.
#define KERNEL(name, Params, threads, blocks)                                                      \
    DEVICE void name##_after(const Params &p);                                                     \
    KERNEL_THAT_WAITS(name, Params, threads, blocks) {                                             \
        wait_for_the_one_before();                                                                 \
        name##_after(p);                                                                           \
    }                                                                                              \
    DEVICE void name##_after(const Params &p)

DEVICE Chunk load_chunk(const unsigned char *p) { return *reinterpret_cast<const Chunk *>(p); }
DEVICE void store_chunk(unsigned char *p, const Chunk &x) { *reinterpret_cast<Chunk *>(p) = x; }

// The elements of a pair of bf16, which are exact in f32.
DEVICE float low_of_bf16(uint32_t pair) { return float_of_bits(pair << 16); }
DEVICE float high_of_bf16(uint32_t pair) { return float_of_bits(pair & 0xffff0000u); }

// Splits two numbers into bf16 terms, largest first; the remainders are exact.
template <int TERMS>
DEVICE void split(uint32_t (&terms)[TERMS], float low, float high) {
    UNROLL
    for (int i = 0; i < TERMS; i++) {
        terms[i] = round_to_bf16(low, high);
        low = add_rn(low, -low_of_bf16(terms[i]));
        high = add_rn(high, -high_of_bf16(terms[i]));
    }
}

// The packed form of the rows: blocks of 64 columns × 3 terms × K rows (rounded up to 8) × 128
// bytes. Of each 32 columns, column 8q + 2j + i lies at position 8j + 2q + i (i < 2; j, q < 4): so
// a lane's fragments of two mma steps are eight adjacent columns of the caller's row. The sixteen
// bytes with positions 8c to 8c + 7 of row k lie at chunk c ^ (k % 8): so ldmatrix meets no bank
// twice, in shared memory that is a plain copy.
constexpr int SLICE = 64;
constexpr int WEIGHT_TERMS = 3;
constexpr int ROW_BYTES = 2 * SLICE;

// Byte offset of a packed row.
DEVICE uint64_t packed_row(uint32_t padded_count, uint32_t slice, uint32_t term, uint32_t k) {
    return ((uint64_t)slice * WEIGHT_TERMS + term) * padded_count * ROW_BYTES + k * ROW_BYTES;
}

DEVICE uint32_t swizzle(uint32_t row, uint32_t chunk) { return (chunk ^ (row & 7)) * 16; }

// The products of terms i of A and j of B that count, i + j <= LEVEL, smallest first: each for all
// steps before the next. `product` is told i − 1, j − 1 and the step.
template <int LEVEL, int A_TERMS, int B_TERMS, int STEPS, typename Product>
DEVICE void in_order(const Product &product) {
    UNROLL
    for (int level = LEVEL; level >= 2; level--) {
        UNROLL
        for (int i = 1; i <= A_TERMS; i++) {
            const int j = level - i;
            if (j < 1 || j > B_TERMS) continue;
            UNROLL
            for (int step = 0; step < STEPS; step++) product(i - 1, j - 1, step);
        }
    }
}

// Accumulators of N tiles.
template <int N>
DEVICE void clear(float (&x)[N][4]) {
    UNROLL
    for (int n = 0; n < N; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) x[n][i] = 0.0f;
    }
}
template <int N>
DEVICE void add(float (&x)[N][4], const float (&y)[N][4]) {
    UNROLL
    for (int n = 0; n < N; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) x[n][i] = add_rn(x[n][i], y[n][i]);
    }
}

// A chain starts at zero and is short, since tensor cores cut off.
template <int LEVEL, int A_TERMS, int B_TERMS, int STEPS>
DEVICE void chain(float (&c)[4], const uint32_t (&a)[A_TERMS][STEPS][4],
                  const uint32_t (&b)[B_TERMS][STEPS][2]) {
    in_order<LEVEL, A_TERMS, B_TERMS, STEPS>([&](int i, int j, int step) {
        mma(c, a[i][step], b[j][step][0], b[j][step][1]);
    });
}
