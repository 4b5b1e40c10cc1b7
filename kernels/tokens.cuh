// What every kernel reads of a token: its mask, and eight adjacent columns of its hidden state.
#pragma once

#include "device.cuh"
#include "params.cuh"

DEVICE float mask_of(const MaskParams &mask, uint64_t t) {
    if (!mask.data) return 1.0f;
    if (mask.is_f32) return reinterpret_cast<const float *>(mask.data)[t * mask.stride];
    return mask.data[t * mask.stride] != 0 ? 1.0f : 0.0f;
}

// Eight adjacent columns of a row.
struct Row8 {
    float v[8];
};

// From the sixteen bytes, or twice sixteen, that hold them.
template <uint32_t DTYPE>
constexpr int CHUNKS_OF_8 = DTYPE == DTYPE_F32 ? 2 : 1;

template <uint32_t DTYPE>
DEVICE void widen(Row8 &x, const Chunk (&chunks)[CHUNKS_OF_8<DTYPE>]) {
    UNROLL
    for (int i = 0; i < 8; i++) {
        if (DTYPE == DTYPE_F32) {
            x.v[i] = float_of_bits(chunks[i / 4 % CHUNKS_OF_8<DTYPE>].v[i % 4]);
        } else if (DTYPE == DTYPE_F16) {
            x.v[i] = float_of_f16(chunks[0].v[i / 2] >> i % 2 * 16);
        } else {
            const uint32_t pair = chunks[0].v[i / 2];
            x.v[i] = i % 2 ? high_of_bf16(pair) : low_of_bf16(pair);
        }
    }
}

// Columns from `column` on of row t, which has d_in of them; zeros where it ends. `dtype` is that
// of the hidden states, so that a kernel that knows it need not look.
DEVICE void load_hidden(Row8 &x, const HiddenParams &hidden, uint32_t dtype, uint64_t t,
                        uint32_t column, uint32_t d_in) {
    const bool whole = hidden.is_aligned && column + 8 <= d_in;
    if (dtype == DTYPE_F32) {
        const unsigned char *at = hidden.data + (t * hidden.stride + column) * 4;
        Chunk chunks[2] = {};
        if (whole) {
            chunks[0] = load_chunk(at);
            chunks[1] = load_chunk(at + 16);
        } else {
            UNROLL
            for (uint32_t i = 0; i < 8; i++) {
                if (column + i >= d_in) continue;
                chunks[i / 4].v[i % 4] = reinterpret_cast<const uint32_t *>(at)[i];
            }
        }
        widen<DTYPE_F32>(x, chunks);
    } else {
        const unsigned char *at = hidden.data + (t * hidden.stride + column) * 2;
        Chunk chunks[1] = {};
        if (whole) {
            chunks[0] = load_chunk(at);
        } else {
            UNROLL
            for (uint32_t i = 0; i < 8; i++) {
                if (column + i >= d_in) continue;
                const uint32_t half = reinterpret_cast<const uint16_t *>(at)[i];
                chunks[0].v[i / 2] |= half << i % 2 * 16;
            }
        }
        if (dtype == DTYPE_F16) widen<DTYPE_F16>(x, chunks);
        else widen<DTYPE_BF16>(x, chunks);
    }
}
