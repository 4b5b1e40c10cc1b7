// What devices of compute capability 9.0 have besides, behind plain functions: clusters of blocks,
// barriers that copies complete, copies to several blocks at once, and products of a warpgroup (128
// threads) whose second operand stays in shared memory. On the host tests/simt/sm90_host.h stands
// in for it.
#pragma once

#include "device.cuh"

// Threads of a warpgroup, and tokens of its products.
constexpr int GROUP_THREADS = 128;
constexpr int GROUP_TOKENS = 64;

#ifdef __CUDACC__

// Other devices have an empty kernel of that name, which is never launched.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SM90_KERNEL(name, Params, threads, ...)                                                  \
    KERNEL_THAT_WAITS(name, Params, threads, 1) { __VA_ARGS__(p); }
#else
#define SM90_KERNEL(name, Params, threads, ...)                                                  \
    KERNEL_THAT_WAITS(name, Params, threads, 1) {}
#endif

// What a warpgroup has of the registers that its block was launched with: a multiple of eight. All
// groups do one or the other, in the branches of one condition.
template <int N>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Clusters ----------------------------------------------------------------------------------

DEVICE uint32_t cluster_rank() {
    uint32_t x;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
    return x;
}
DEVICE uint32_t cluster_size() {
    uint32_t x;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
    return x;
}

// A barrier of all threads of a cluster; what they wrote to shared memory is there.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// An address in the shared memory of another block of the cluster: the same place there.
DEVICE uint32_t address_in_block(const void *shared, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(shared)), "r"(rank));
    return address;
}

// ---- Barriers ----------------------------------------------------------------------------------

// A barrier of one warpgroup of the block.
DEVICE void sync_group(uint32_t group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// The same, with a vote.
DEVICE bool any_in_group(uint32_t group, bool x) {
    uint32_t any;
    asm volatile("{\n\t.reg .pred own, all;\n\t"
                 "setp.ne.u32 own, %1, 0;\n\t"
                 "bar.red.or.pred all, %2, 128, own;\n\t"
                 "selp.u32 %0, 1, 0, all;\n\t}"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(group + 1)
                 : "memory");
    return any != 0;
}

// Barriers in shared memory. A phase ends when all arrivals and all announced bytes have come.
DEVICE void barrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}
// After the last of them, and before the cluster's first sync.
DEVICE void barriers_are_set() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival, which announces bytes of copies.
DEVICE void barrier_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// One arrival at the barrier in the same place of a block of the cluster. It says that something has
// been read, and publishes nothing that was written.
DEVICE void barrier_arrive(uint64_t *barrier, uint32_t rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                     address_in_block(barrier, rank))
                 : "memory");
}
// Until the phase of that parity has ended; the phase before a barrier's first counts as odd. What its
// copies brought is there.
DEVICE void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred done;\n"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// The same for what other blocks stored.
DEVICE void barrier_wait_for_stores(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred done;\n"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// ---- Copies ------------------------------------------------------------------------------------

// Sixteen bytes or a multiple, between places at sixteen bytes; they count for the barrier.
DEVICE void copy_bulk(unsigned char *shared, const unsigned char *global, uint32_t bytes,
                      uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// The same to the same place in every block of the cluster, where they count for its barrier.
DEVICE void copy_bulk_to_all(unsigned char *shared, const unsigned char *global, uint32_t bytes,
                             uint64_t *barrier) {
    const uint32_t blocks = cluster_size();
    // A launch without clusters need not know of them.
    if (blocks == 1) return copy_bulk(shared, global, bytes, barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier)),
                 "h"((uint16_t)((1u << blocks) - 1))
                 : "memory");
}
// Eight bytes to the same place in a block of the cluster, where they count for its barrier.
DEVICE void store_in_block(float *shared, FloatPair pair, uint64_t *barrier, uint32_t rank) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
                 "[%3];" ::"r"(address_in_block(shared, rank)),
                 "f"(pair.low), "f"(pair.high), "r"(address_in_block(barrier, rank))
                 : "memory");
}
// Shared memory that ordinary stores wrote is there for products, after a barrier.
DEVICE void stores_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Products ----------------------------------------------------------------------------------

// Packed rows of one slice, from a multiple of 1024 on. Steps are 32 bytes apart along columns, 2048
// along rows.
DEVICE uint64_t rows_in_shared(const unsigned char *shared) {
    constexpr uint64_t SWIZZLE_128 = (uint64_t)1 << 62, EIGHT_ROWS = 8 * ROW_BYTES / 16;
    return SWIZZLE_128 | EIGHT_ROWS << 32 | (shared_address(shared) >> 4 & 0x3fff);
}
DEVICE uint64_t step_on(uint64_t rows, uint32_t bytes) { return rows + (bytes >> 4); }

// The compiler may not move what is done to a register across this.
template <int N>
DEVICE void pin(float (&x)[N][4]) {
    UNROLL
    for (int n = 0; n < N; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(x[n][i])::"memory");
    }
}
template <int TERMS, int STEPS>
DEVICE void pin(uint32_t (&x)[TERMS][STEPS][4]) {
    UNROLL
    for (int term = 0; term < TERMS; term++) {
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            UNROLL
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(x[term][step][i])::"memory");
        }
    }
}

// No register of what follows is written before `products_end`, or read if it is an accumulator.
template <int N, typename... Operands>
DEVICE void products_begin(float (&c)[N][4], Operands &...a) {
    pin(c);
    (pin(a), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

#define ACCUMULATOR(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])

// c += a · b: 64 × 16 times 16 × 8N. The warps hold sixteen rows each, as mma does; b is 8N rows of 16
// columns, or transposed 16 rows of 64 columns.
DEVICE void products(float (&c)[1][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3"
                 "}, {%4, %5, %6, %7}, %8, add, 1, 1, 0;\n\t}"
                 : ACCUMULATOR(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void products(float (&c)[2][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7"
                 "}, {%8, %9, %10, %11}, %12, add, 1, 1, 0;\n\t}"
                 : ACCUMULATOR(c, 0), ACCUMULATOR(c, 1)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void products(float (&c)[3][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
                 "}, {%12, %13, %14, %15}, %16, add, 1, 1, 0;\n\t}"
                 : ACCUMULATOR(c, 0), ACCUMULATOR(c, 1), ACCUMULATOR(c, 2)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void products(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15"
                 "}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n\t}"
                 : ACCUMULATOR(c, 0), ACCUMULATOR(c, 1), ACCUMULATOR(c, 2), ACCUMULATOR(c, 3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void products(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n\t}"
                 : ACCUMULATOR(c, 0), ACCUMULATOR(c, 1), ACCUMULATOR(c, 2), ACCUMULATOR(c, 3),
                   ACCUMULATOR(c, 4), ACCUMULATOR(c, 5), ACCUMULATOR(c, 6), ACCUMULATOR(c, 7)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void products_transposed(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n\t}"
                 : ACCUMULATOR(c, 0), ACCUMULATOR(c, 1), ACCUMULATOR(c, 2), ACCUMULATOR(c, 3),
                   ACCUMULATOR(c, 4), ACCUMULATOR(c, 5), ACCUMULATOR(c, 6), ACCUMULATOR(c, 7)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef ACCUMULATOR

// Until all products are there.
template <int N>
DEVICE void products_end(float (&c)[N][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;\n\t"
                 "wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(c);
}

#else
#include "sm90_host.h"
#endif

// Where so many rounds take turns with STAGES stages: until the last of each is empty. No other block
// then arrives at these barriers any more, so this one may end.
template <int STAGES>
DEVICE void wait_until_empty(uint64_t *empty, uint32_t rounds) {
    for (uint32_t i = 0; i < STAGES && i < rounds; i++) {
        barrier_wait(empty + i, (rounds - 1 - i) / STAGES % 2);
    }
}
