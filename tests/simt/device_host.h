// The host's stand-in for what kernels/device.cuh has on the device.
#pragma once

#include <math.h>
#include <string.h>

#include "simt.h"

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define UNROLL
#define NO_UNROLL
#define KERNEL_THAT_WAITS(name, Params, threads, blocks)                                           \
    static void name(const Params &p);                                                             \
    static const simt::Kernel name##_kernel(#name, threads, sizeof(Params), [](const void *p) {    \
        name(*static_cast<const Params *>(p));                                                     \
    });                                                                                            \
    static void name(const Params &p)

DEVICE void wait_for_the_one_before() { simt::wait_for_the_one_before(); }

DEVICE uint32_t thread_index() { return simt::thread_index(); }
DEVICE uint32_t block_index() { return simt::block_index(); }
DEVICE uint32_t block_count() { return simt::block_count(); }
DEVICE unsigned char *shared_memory() { return simt::shared_memory(); }
DEVICE void sync_block() { simt::sync_block(); }

DEVICE bool any_in_block(bool x) { return simt::any_in_block(x); }

DEVICE void sync_warp() {
    simt::meet(nullptr, [](void *const(&)[32]) {});
}

DEVICE bool any_in_warp(bool x) {
    struct Own {
        bool in, out;
    } own = {x, false};
    simt::meet(&own, [](void *const(&lanes)[32]) {
        bool any = false;
        for (void *lane : lanes) any |= static_cast<Own *>(lane)->in;
        for (void *lane : lanes) static_cast<Own *>(lane)->out = any;
    });
    return own.out;
}

DEVICE uint32_t vote_in_warp(bool x) {
    struct Own {
        bool in;
        uint32_t out;
    } own = {x, 0};
    simt::meet(&own, [](void *const(&lanes)[32]) {
        uint32_t votes = 0;
        for (uint32_t i = 0; i < 32; i++) votes |= (uint32_t)static_cast<Own *>(lanes[i])->in << i;
        for (void *lane : lanes) static_cast<Own *>(lane)->out = votes;
    });
    return own.out;
}

DEVICE uint32_t sum_in_warp(uint32_t x) {
    uint32_t own = x;
    simt::meet(&own, [](void *const(&lanes)[32]) {
        uint32_t sum = 0;
        for (void *lane : lanes) sum += *static_cast<uint32_t *>(lane);
        for (void *lane : lanes) *static_cast<uint32_t *>(lane) = sum;
    });
    return own;
}

DEVICE uint32_t count_bits(uint32_t x) { return __builtin_popcount(x); }

template <typename T>
DEVICE T shuffle_any(T x, uint32_t lanes) {
    struct Own {
        T in, out;
        uint32_t lanes;
    } own = {x, x, lanes};
    simt::meet(&own, [](void *const(&lanes)[32]) {
        for (uint32_t i = 0; i < 32; i++) {
            Own &to = *static_cast<Own *>(lanes[i]);
            to.out = static_cast<Own *>(lanes[(i ^ to.lanes) % 32])->in;
        }
    });
    return own.out;
}

DEVICE uint32_t shuffle_xor(uint32_t x, uint32_t lanes) { return shuffle_any(x, lanes); }
DEVICE double shuffle_xor(double x, uint32_t lanes) { return shuffle_any(x, lanes); }

// Built with -ffp-contract=off.
DEVICE float add_rn(float x, float y) { return x + y; }
DEVICE float mul_rn(float x, float y) { return x * y; }
DEVICE double add_rn(double x, double y) { return x + y; }
DEVICE double mul_rn(double x, double y) { return x * y; }

DEVICE float fma_rn(float x, float y, float z) { return fmaf(x, y, z); }

DEVICE float float_of_bits(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE uint32_t bits_of_float(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE double double_of_bits(uint64_t x) {
    double y;
    memcpy(&y, &x, 8);
    return y;
}
DEVICE uint64_t bits_of_double(double x) {
    uint64_t y;
    memcpy(&y, &x, 8);
    return y;
}

DEVICE uint32_t round_to_bf16(float x) {
    const uint32_t bits = bits_of_float(x);
    if (isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE uint32_t round_to_bf16(float low, float high) {
    return round_to_bf16(high) << 16 | round_to_bf16(low);
}

DEVICE uint32_t round_to_f16(float x) {
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    if (isnan(x)) return 0x7fff;
    // Halfway between the largest number and what would follow it.
    if (size >= 65520.0f) return sign | 0x7c00;
    // Subnormal: the sum's unit in the last place is f16's smallest number.
    if (size < 6.103515625e-5f) return sign | (bits_of_float(size + 0.5f) - bits_of_float(0.5f));
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return sign | ((rounded >> 13) - (112 << 10));
}
DEVICE uint32_t round_to_f16(float low, float high) {
    return round_to_f16(high) << 16 | round_to_f16(low);
}
DEVICE float float_of_f16(uint16_t x) {
    const uint32_t exponent = x >> 10 & 31, fraction = x & 0x3ff;
    // Subnormals have the exponent of the smallest normal number, and no leading one.
    const uint32_t significand = exponent ? fraction | 0x400 : fraction;
    float size = ldexpf((float)significand, (exponent ? (int)exponent : 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return x >> 15 ? -size : size;
}

DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::Fragments own = {c, a, {b0, b1}};
    simt::meet(&own, simt::mma);
}

template <bool TRANSPOSED>
DEVICE void ldmatrix_any(uint32_t (&r)[4], const unsigned char *row) {
    struct Own {
        uint32_t *r;
        const unsigned char *row;
    } own = {r, row};
    simt::check_shared(row, 16);
    simt::meet(&own, [](void *const(&lanes)[32]) {
        for (uint32_t lane = 0; lane < 32; lane++) {
            const uint32_t g = lane / 4, q = lane % 4;
            for (uint32_t matrix = 0; matrix < 4; matrix++) {
                const auto element = [&](uint32_t row, uint32_t column) {
                    uint16_t x;
                    memcpy(&x, static_cast<Own *>(lanes[8 * matrix + row])->row + 2 * column, 2);
                    return (uint32_t)x;
                };
                static_cast<Own *>(lanes[lane])->r[matrix] =
                    TRANSPOSED ? element(2 * q + 1, g) << 16 | element(2 * q, g)
                               : element(g, 2 * q + 1) << 16 | element(g, 2 * q);
            }
        }
    });
}
DEVICE void ldmatrix(uint32_t (&r)[4], const unsigned char *row) { ldmatrix_any<false>(r, row); }
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const unsigned char *row) {
    ldmatrix_any<true>(r, row);
}

DEVICE void copy_async(unsigned char *shared, const unsigned char *global, uint32_t bytes) {
    simt::copy_async(shared, global, bytes);
}
DEVICE void copy_commit() { simt::copy_commit(); }
template <int N>
DEVICE void copy_wait() {
    simt::copy_wait(N);
}
