// The host's stand-in for what kernels/sm90.cuh has on the device.
#pragma once

#include "simt.h"

#define SM90_KERNEL(name, Params, threads, ...)                                                    \
    KERNEL_THAT_WAITS(name, Params, threads, 1) { __VA_ARGS__(p); }

template <int N>
DEVICE void give_registers() {}
template <int N>
DEVICE void take_registers() {}

DEVICE uint32_t cluster_rank() { return simt::cluster_rank(); }
DEVICE uint32_t cluster_size() { return simt::cluster_size(); }
DEVICE void sync_cluster() { simt::sync_cluster(); }

DEVICE void sync_group(uint32_t group) { simt::sync_group(group, false); }
DEVICE bool any_in_group(uint32_t group, bool x) { return simt::sync_group(group, x); }

DEVICE void barrier_init(uint64_t *barrier, uint32_t arrivals) {
    simt::barrier_init(barrier, arrivals);
}
DEVICE void barriers_are_set() {}
DEVICE void barrier_expect(uint64_t *barrier, uint32_t bytes) {
    simt::barrier_expect(barrier, bytes);
}
DEVICE void barrier_arrive(uint64_t *barrier, uint32_t rank) {
    simt::barrier_arrive(barrier, rank);
}
DEVICE void barrier_wait(uint64_t *barrier, uint32_t parity) {
    simt::barrier_wait(barrier, parity);
}
DEVICE void barrier_wait_for_stores(uint64_t *barrier, uint32_t parity) {
    simt::barrier_wait(barrier, parity);
}

DEVICE void copy_bulk(unsigned char *shared, const unsigned char *global, uint32_t bytes,
                      uint64_t *barrier) {
    simt::copy_bulk(shared, global, bytes, barrier, simt::cluster_rank());
}
DEVICE void copy_bulk_to_all(unsigned char *shared, const unsigned char *global, uint32_t bytes,
                             uint64_t *barrier) {
    for (uint32_t rank = 0; rank < simt::cluster_size(); rank++) {
        simt::copy_bulk(shared, global, bytes, barrier, rank);
    }
}
DEVICE void store_in_block(float *shared, FloatPair pair, uint64_t *barrier, uint32_t rank) {
    simt::store_in_block(shared, &pair, sizeof pair, barrier, rank);
}
DEVICE void stores_before_products() {}

// The device's own form: a start, the distance of eight rows, the swizzle of 128 bytes.
DEVICE uint64_t rows_in_shared(const unsigned char *shared) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | simt::shared_offset(shared) >> 4;
}
DEVICE uint64_t step_on(uint64_t rows, uint32_t bytes) { return rows + (bytes >> 4); }

template <int N, typename... Operands>
DEVICE void products_begin(float (&)[N][4], Operands &...) {
    simt::products_begin();
}
template <int N>
DEVICE void products(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
    simt::products({c[0], a, b, N, false});
}
DEVICE void products_transposed(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    simt::products({c[0], a, b, 8, true});
}
template <int N>
DEVICE void products_end(float (&)[N][4]) {
    simt::products_end();
}
