// From a product to a latent: its gate, its share in the penalty, and how many tokens share. The
// formulas are those of encode.cu's opening comment.
#pragma once

#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

struct Share {
    float coef;
    double loss;
};

// A latent with its own numbers.
struct Latent {
    float scale, bias, gate_value;
    uint32_t group;

    DEVICE_MEMBER void load(const RowsParams &rows, uint32_t k) {
        scale = rows.scale ? rows.scale[k] : 1.0f;
        bias = rows.bias ? rows.bias[k] : 0.0f;
        gate_value = rows.gate_values ? rows.gate_values[k] : 0.0f;
        group = rows.group ? rows.group[k] : 0;
    }

    // Written so that NaN leaves the latent on.
    DEVICE_MEMBER bool off(const EncodeParams &p, uint64_t t, float dot, float pre) const {
        if (p.rows.gate == GATE_OPEN) return false;
        if (p.rows.gate == GATE_GATED) return (add_rn(dot, gate_value) <= 0.0f) | (pre <= 0.0f);
        if (p.rows.gate == GATE_TOPK) {
            // With a gain, in the order in which the rivals' own was computed.
            const float placed = p.rows.gate_values
                                     ? add_rn(mul_rn(dot, gate_value), mul_rn(gate_value, bias))
                                     : pre;
            const float rank = p.rows.by_magnitude ? fabsf(placed) : placed;
            return rank <= p.thresholds[t * p.rows.groups + group];
        }
        return pre <= gate_value;
    }

    // What z costs, and the coefficient if the latent is on.
    DEVICE_MEMBER Share share(float z, float reference, float sign_weight, float mask) const {
        const float x = sign_weight < 0.0f ? add_rn(reference, -z) : add_rn(z, -reference);
        const float r = x <= 0.0f ? 0.0f : x;
        const float slope = mul_rn(mul_rn(2.0f, sign_weight), r);
        const double weight = fabsf(sign_weight);
        const double loss = mul_rn(weight, mul_rn((double)r, (double)r));
        return {mul_rn(mul_rn(mask, slope), scale), mul_rn((double)mask, loss)};
    }
};

// The mask's sum over the tile's tokens, by one warp.
template <uint32_t TOKENS>
DEVICE void write_count(const EncodeParams &p, uint64_t first_token, uint64_t tile) {
    double count = 0.0;
    UNROLL
    for (uint32_t i = 0; i < TOKENS; i += 32) {
        const uint64_t t = first_token + i + thread_index() % 32;
        if (t < p.tokens) count = add_rn(count, (double)mask_of(p.mask, t));
    }
    UNROLL
    for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
        count = add_rn(count, shuffle_xor(count, lanes));
    }
    if (thread_index() % 32 == 0) p.count_partials[tile] = count;
}
