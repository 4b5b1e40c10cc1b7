// Packs encoder rows for the tensor cores.
//
//   W[k, i] = W1 + W2 + W3, each a bf16 number: the one nearest to what the terms before it left.
//
// Parallelisation: a thread packs eight positions of a row (device.cuh has the form): all three
// terms, one store of sixteen bytes each. Rows from K on and columns from d on become zeros.
// Bytes moved: 4 · K · d read, 6 · K · d written. Once for a plan, or once for a raw call.
// Determinism: every output depends on its own input alone.
#include "device.cuh"
#include "params.cuh"

// Without a remainder where the term is infinite or NaN: infinity less infinity would be NaN.
DEVICE float rest(float x, float term) {
    return fabsf(term) <= 3.4e38f ? add_rn(x, -term) : 0.0f;
}

KERNEL(blockem_pack, PackParams, 256, 1) {
    const uint64_t thread = (uint64_t)block_index() * 256 + thread_index();
    const uint32_t chunk = thread % 8;
    const uint32_t k = thread / 8 % p.padded_count;
    const uint64_t slice = thread / 8 / p.padded_count;
    if (slice >= p.slices) return;

    Chunk terms[WEIGHT_TERMS];
    UNROLL
    for (uint32_t q = 0; q < 4; q++) {
        const uint32_t j = chunk % 4;
        const uint64_t column = slice * SLICE + chunk / 4 * 32 + 8 * q + 2 * j;
        const float *from = p.weight + k * p.weight_stride + column;
        float low = k < p.count && column < p.d_in ? from[0] : 0.0f;
        float high = k < p.count && column + 1 < p.d_in ? from[1] : 0.0f;
        UNROLL
        for (int term = 0; term < WEIGHT_TERMS; term++) {
            const uint32_t pair = round_to_bf16(low, high);
            terms[term].v[q] = pair;
            low = rest(low, low_of_bf16(pair));
            high = rest(high, high_of_bf16(pair));
        }
    }
    UNROLL
    for (int term = 0; term < WEIGHT_TERMS; term++) {
        const uint64_t row = packed_row(p.padded_count, slice, term, k);
        store_chunk(p.packed + row + swizzle(k, chunk), terms[term]);
    }
}
