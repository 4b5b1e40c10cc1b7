// What all kernels that write dH have in common: coefficients on their way to the tensor cores, and
// rows of dH on their way to memory. The formulas are those of gradient.cu's opening comment.
#pragma once

#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

// What dH is written as, from products of so many terms of coefficients and rows.
struct ToF32 {
    static constexpr uint32_t DTYPE = DTYPE_F32;
    static constexpr int BYTES = 4, TERMS = 3, LEVEL = 4, CHUNKS = CHUNKS_OF_8<DTYPE>;

    DEVICE_MEMBER static void store(Chunk (&chunks)[CHUNKS], const Row8 &x) {
        UNROLL
        for (int i = 0; i < 8; i++) chunks[i / 4].v[i % 4] = bits_of_float(x.v[i]);
    }
};

struct ToF16 {
    static constexpr uint32_t DTYPE = DTYPE_F16;
    static constexpr int BYTES = 2, TERMS = 2, LEVEL = 3, CHUNKS = CHUNKS_OF_8<DTYPE>;

    DEVICE_MEMBER static void store(Chunk (&chunks)[CHUNKS], const Row8 &x) {
        UNROLL
        for (int i = 0; i < 4; i++) chunks[0].v[i] = round_to_f16(x.v[2 * i], x.v[2 * i + 1]);
    }
};

struct ToBf16 {
    static constexpr uint32_t DTYPE = DTYPE_BF16;
    static constexpr int BYTES = 2, TERMS = 2, LEVEL = 3, CHUNKS = CHUNKS_OF_8<DTYPE>;

    DEVICE_MEMBER static void store(Chunk (&chunks)[CHUNKS], const Row8 &x) {
        UNROLL
        for (int i = 0; i < 4; i++) chunks[0].v[i] = round_to_bf16(x.v[2 * i], x.v[2 * i + 1]);
    }
};

// Where a thread writes: its first row (the others are 8 apart) and its first column.
struct Place {
    uint64_t token;
    uint32_t column;
};

// One warp's coefficients of 32 latents: of each of the lane's four rows those at 8j + 2q and the
// next, j < 4.
template <int TILES_M>
struct Coefs {
    FloatPair x[TILES_M][2][4];

    DEVICE_MEMBER void load(const GradientParams &p, uint64_t token, uint32_t latent) {
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const uint64_t t = token + 16 * m + 8 * half;
                const float *row = p.coef + t * p.coef_stride;
                UNROLL
                for (int j = 0; j < 4; j++) {
                    const uint32_t k = latent + 8 * j + thread_index() % 4 * 2;
                    FloatPair &pair = x[m][half][j];
                    pair.low = pair.high = 0.0f;
                    if (t >= p.tokens || k >= p.count) continue;
                    if (p.coef_is_aligned && k + 1 < p.count) {
                        pair = *reinterpret_cast<const FloatPair *>(row + k);
                    } else {
                        pair.low = row[k];
                        if (k + 1 < p.count) pair.high = row[k + 1];
                    }
                }
            }
        }
    }

    // Bit 2m + half: that row has a coefficient that is not zero.
    DEVICE_MEMBER uint32_t active() const {
        uint32_t rows = 0;
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    const FloatPair &pair = x[m][half][j];
                    if (pair.low != 0.0f || pair.high != 0.0f) rows |= 1u << (2 * m + half);
                }
            }
        }
        return rows;
    }
};

DEVICE float times(float factor, float coef) { return coef == 0.0f ? 0.0f : mul_rn(factor, coef); }

template <typename Out, int TILES_M>
DEVICE void split_all(uint32_t (&a)[TILES_M][Out::TERMS][2][4], const Coefs<TILES_M> &coefs,
                      float factor) {
    UNROLL
    for (int m = 0; m < TILES_M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                const FloatPair &pair = coefs.x[m][half][j];
                uint32_t terms[Out::TERMS];
                split(terms, times(factor, pair.low), times(factor, pair.high));
                UNROLL
                for (int term = 0; term < Out::TERMS; term++) {
                    a[m][term][j / 2][j % 2 * 2 + half] = terms[term];
                }
            }
        }
    }
}

// Sums of a warp: TILES_M · 16 tokens × one slice, as tiles of an mma.
constexpr int SLICE_TILES = SLICE / 8;
template <int TILES_M>
using Tiles = float[TILES_M][SLICE_TILES][4];

// Columns 32 · part + 8q on of row `half` of tile m. The packed form makes them adjacent.
template <int TILES_M>
DEVICE Row8 row_of(const Tiles<TILES_M> &sums, int m, int half, int part) {
    Row8 out;
    UNROLL
    for (int i = 0; i < 8; i++) out.v[i] = sums[m][4 * part + i / 2][2 * half + i % 2];
    return out;
}

// What a norm adds to eight columns of row t: −pull · (h − mean).
template <typename Out>
DEVICE void add_pull(const GradientParams &p, Row8 &sum, uint64_t t, uint32_t column) {
    const FloatPair pair = reinterpret_cast<const FloatPair *>(p.pulls)[t];
    const float pull = pair.low, mean = pair.high;
    if (pull == 0.0f || column >= p.d_in) return;
    // A result of sixteen bits has the dtype of h.
    const uint32_t dtype = Out::DTYPE == DTYPE_F32 ? p.hidden.dtype : Out::DTYPE;
    Row8 h;
    load_hidden(h, p.hidden, dtype, t, column, p.d_in);
    UNROLL
    for (int i = 0; i < 8; i++) {
        sum.v[i] = add_rn(sum.v[i], -mul_rn(pull, add_rn(h.v[i], -mean)));
    }
}

// Elements one by one: where rows are not aligned, and where they end.
template <typename Out>
DEVICE void write_elements(const GradientParams &p, unsigned char *at, uint32_t columns,
                           const Row8 &sum) {
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
        if (i >= columns) continue;
        Chunk chunks[Out::CHUNKS] = {};
        Row8 x = {};
        if (Out::BYTES == 4) {
            float *element = reinterpret_cast<float *>(at) + i;
            *element = p.accumulate ? add_rn(*element, sum.v[i]) : sum.v[i];
        } else {
            uint16_t *element = reinterpret_cast<uint16_t *>(at) + i;
            if (p.accumulate) {
                chunks[0].v[0] = *element;
                widen<Out::DTYPE>(x, chunks);
            }
            x.v[0] = p.accumulate ? add_rn(x.v[0], sum.v[i]) : sum.v[i];
            Out::store(chunks, x);
            *element = chunks[0].v[0];
        }
    }
}

// The warp's tile. `active`: rows with a violation.
template <typename Out, int TILES_M>
DEVICE void write_rows(const GradientParams &p, const Tiles<TILES_M> &sums, const Place &place,
                       uint32_t active) {
    constexpr int PARTS = SLICE / 32;
    const uint64_t row_bytes = p.grad_stride * Out::BYTES;
    unsigned char *rows =
        p.grad + place.token * row_bytes + (uint64_t)place.column * Out::BYTES;
    UNROLL
    for (int m = 0; m < TILES_M; m++) {
        Chunk old[2][PARTS][Out::CHUNKS];
        // All reads before the first write: more of them are under way at a time.
        if (p.accumulate && p.grad_is_aligned) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int row = 16 * m + 8 * half;
                if (place.token + row >= p.tokens || !(active >> (2 * m + half) & 1)) continue;
                UNROLL
                for (int part = 0; part < PARTS; part++) {
                    if (place.column + 32 * part + 8 > p.d_in) continue;
                    UNROLL
                    for (int i = 0; i < Out::CHUNKS; i++) {
                        const int at = 32 * part * Out::BYTES + 16 * i;
                        old[half][part][i] = load_chunk(rows + row * row_bytes + at);
                    }
                }
            }
        }
        UNROLL
        for (int half = 0; half < 2; half++) {
            const int row = 16 * m + 8 * half;
            if (place.token + row >= p.tokens) continue;
            if (p.accumulate && !(active >> (2 * m + half) & 1)) continue;
            UNROLL
            for (int part = 0; part < PARTS; part++) {
                const uint32_t column = place.column + 32 * part;
                unsigned char *at = rows + row * row_bytes + 32 * part * Out::BYTES;
                Row8 sum = row_of(sums, m, half, part);
                if (p.pulls) add_pull<Out>(p, sum, place.token + row, column);
                if (p.grad_is_aligned && column + 8 <= p.d_in) {
                    if (p.accumulate) {
                        Row8 before;
                        widen<Out::DTYPE>(before, old[half][part]);
                        UNROLL
                        for (int i = 0; i < 8; i++) sum.v[i] = add_rn(before.v[i], sum.v[i]);
                    }
                    Chunk chunks[Out::CHUNKS];
                    Out::store(chunks, sum);
                    UNROLL
                    for (int i = 0; i < Out::CHUNKS; i++) store_chunk(at + 16 * i, chunks[i]);
                } else if (column < p.d_in) {
                    write_elements<Out>(p, at, p.d_in - column, sum);
                }
            }
        }
    }
}

