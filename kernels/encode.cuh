// What all kernels that encode have in common: hidden states on their way to the tensor cores, the
// order in which products are added up, and what becomes of a tile of dot products. The formulas are
// those of encode.cu's opening comment.
#pragma once

#include "device.cuh"
#include "latent.cuh"
#include "params.cuh"
#include "tokens.cuh"

// How each dtype becomes bf16 terms: exact for all three, subnormals of f32 aside.
struct F32 {
    static constexpr int BYTES = 4, TERMS = 3;
};
struct F16 {
    static constexpr int BYTES = 2, TERMS = 2;
};
struct Bf16 {
    static constexpr int BYTES = 2, TERMS = 1;
};

// Products of terms that count, by their levels (device.cuh).
constexpr int ENCODE_LEVEL = 4;

// Bytes of a row of hidden states in shared memory: one slice.
template <typename H>
constexpr int HIDDEN_ROW = SLICE * H::BYTES;

// Sixteen bytes of row r lie at chunk c ^ …: the rows g and g + 1 that eight lanes read together
// then share no bank.
template <typename H>
DEVICE uint32_t hidden_swizzle(uint32_t r, uint32_t c) {
    return (c ^ (H::BYTES == 4 ? r & 1 : (r & 1) * 4)) * 16;
}

// Eight adjacent columns of a row, 32 · half + 8q on, as bf16 terms: four pairs of each.
template <typename H>
struct Eight {
    uint32_t terms[H::TERMS][4];

    DEVICE_MEMBER void load(const unsigned char *row, uint32_t r, uint32_t half, uint32_t q);
};

template <>
DEVICE_MEMBER void Eight<Bf16>::load(const unsigned char *row, uint32_t r, uint32_t half,
                                     uint32_t q) {
    const Chunk x = load_chunk(row + hidden_swizzle<Bf16>(r, 4 * half + q));
    UNROLL
    for (int i = 0; i < 4; i++) terms[0][i] = x.v[i];
}

template <>
DEVICE_MEMBER void Eight<F16>::load(const unsigned char *row, uint32_t r, uint32_t half,
                                    uint32_t q) {
    const Chunk x = load_chunk(row + hidden_swizzle<F16>(r, 4 * half + q));
    UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t pair[2];
        split(pair, float_of_f16(x.v[i] & 0xffff), float_of_f16(x.v[i] >> 16));
        terms[0][i] = pair[0];
        terms[1][i] = pair[1];
    }
}

template <>
DEVICE_MEMBER void Eight<F32>::load(const unsigned char *row, uint32_t r, uint32_t half,
                                    uint32_t q) {
    UNROLL
    for (int n = 0; n < 2; n++) {
        const Chunk x = load_chunk(row + hidden_swizzle<F32>(r, 8 * half + 2 * q + n));
        UNROLL
        for (int i = 0; i < 2; i++) {
            uint32_t pair[3];
            split(pair, float_of_bits(x.v[2 * i]), float_of_bits(x.v[2 * i + 1]));
            UNROLL
            for (int term = 0; term < 3; term++) terms[term][2 * n + i] = pair[term];
        }
    }
}

// A slice of the sixteen rows from `hidden` on, as the A of four steps.
template <typename H>
DEVICE void load_rows(uint32_t (&a)[H::TERMS][4][4], const unsigned char *hidden) {
    const uint32_t g = thread_index() % 32 / 4, q = thread_index() % 4;
    UNROLL
    for (int half = 0; half < 2; half++) {
        Eight<H> low, high;
        low.load(hidden + g * HIDDEN_ROW<H>, g, half, q);
        high.load(hidden + (g + 8) * HIDDEN_ROW<H>, g + 8, half, q);
        UNROLL
        for (int term = 0; term < H::TERMS; term++) {
            UNROLL
            for (int step = 0; step < 2; step++) {
                uint32_t(&x)[4] = a[term][2 * half + step];
                x[0] = low.terms[term][2 * step];
                x[1] = high.terms[term][2 * step];
                x[2] = low.terms[term][2 * step + 1];
                x[3] = high.terms[term][2 * step + 1];
            }
        }
    }
}

// The copies of a slice of TOKENS hidden states by THREADS threads.
template <typename H, int THREADS, int TOKENS>
struct HiddenLoader {
    static constexpr int CHUNKS = HIDDEN_ROW<H> / 16;
    static constexpr int ROW_STEP = THREADS / CHUNKS;
    static constexpr int ROWS = TOKENS / ROW_STEP;

    const EncodeParams &p;
    uint32_t thread;
    uint64_t first_token;
    // Bit i: row i of this thread is there and counts.
    uint32_t live;

    // Bits of the rows from `token` on.
    DEVICE_MEMBER uint32_t live_from(uint64_t token) const {
        uint32_t bits = 0;
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            const uint64_t t = token + thread / CHUNKS + i * ROW_STEP;
            if (t < p.tokens && mask_of(p.mask, t) != 0.0f) bits |= 1u << i;
        }
        return bits;
    }

    DEVICE_MEMBER void load(unsigned char *to, uint32_t slice) const {
        const uint32_t chunk = thread % CHUNKS, row = thread / CHUNKS;
        const uint32_t start = slice * SLICE + chunk * (16 / H::BYTES);
        const uint32_t left = start < p.rows.d_in ? (p.rows.d_in - start) * H::BYTES : 0;
        const uint32_t bytes = left < 16 ? left : 16;
        const uint64_t row_bytes = p.hidden.stride * H::BYTES;
        const unsigned char *from =
            p.hidden.data + (first_token + row) * row_bytes + (uint64_t)start * H::BYTES;
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            const uint32_t r = row + i * ROW_STEP;
            unsigned char *at = to + r * HIDDEN_ROW<H> + hidden_swizzle<H>(r, chunk);
            const uint32_t n = live >> i & 1 ? bytes : 0;
            // Where nothing is read any address will do, but it must be one.
            if (p.hidden.is_aligned) copy_async(at, n ? from : p.hidden.data, n);
            else copy_elements(at, from, n);
            from += ROW_STEP * row_bytes;
        }
    }

    // The same where sixteen bytes at once would not be aligned.
    DEVICE_MEMBER static void copy_elements(unsigned char *at, const unsigned char *from,
                                            uint32_t bytes) {
        Chunk x;
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            if (H::BYTES == 4) {
                x.v[i] = 4 * i < bytes ? reinterpret_cast<const uint32_t *>(from)[i] : 0;
            } else {
                const uint16_t *halves = reinterpret_cast<const uint16_t *>(from);
                const uint32_t low = 4 * i < bytes ? halves[2 * i] : 0;
                const uint32_t high = 4 * i + 2 < bytes ? halves[2 * i + 1] : 0;
                x.v[i] = high << 16 | low;
            }
        }
        store_chunk(at, x);
    }
};

// a_t
DEVICE float scale_of(const EncodeParams &p, uint64_t t) {
    return p.token_scales ? p.token_scales[t] : 1.0f;
}

// A dot product is added up in the same order by every kernel of a device: the chains of its slices
// one after the other in eight parts of the row, as equal as they can be, and then the parts.
constexpr uint32_t PARTS = 8;

// The first slice of a part, or behind the last.
DEVICE uint32_t part_start(uint32_t slices, uint32_t part) { return part * slices / PARTS; }

// A warp's dot products: TILES_M × TILES_N accumulators.
template <int TILES_M, int TILES_N>
struct Dots {
    float part[TILES_M][TILES_N][4], total[TILES_M][TILES_N][4];
    uint32_t slices;
    // The part that is being added up.
    uint32_t now;

    DEVICE_MEMBER void begin(uint32_t all_slices) {
        slices = all_slices;
        now = 0;
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            clear(part[m]);
            clear(total[m]);
        }
    }

    // Before the chains of a slice are added.
    DEVICE_MEMBER void reach(uint32_t slice) {
        while (part_start(slices, now + 1) <= slice) end_part();
    }

    // Parts without a slice are zero.
    DEVICE_MEMBER void end_part() {
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            add(total[m], part[m]);
            clear(part[m]);
        }
        now++;
    }

    // After the last slice: all parts, times the scale that a norm gives each token. The first row in
    // this lane is `token`.
    DEVICE_MEMBER void finish(const EncodeParams &p, uint64_t token) {
        end_part();
        if (!p.token_scales) return;
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const uint64_t t = token + 16 * m + 8 * half;
                const bool counts = t < p.tokens && mask_of(p.mask, t) != 0.0f;
                const float scale = counts ? scale_of(p, t) : 0.0f;
                UNROLL
                for (int n = 0; n < TILES_N; n++) {
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        float &x = total[m][n][2 * half + i];
                        x = mul_rn(x, scale);
                    }
                }
            }
        }
    }
};

// z of one latent of a token.
DEVICE float latent_of(const EncodeParams &p, const Latent &own, uint64_t t, float dot) {
    const float pre = add_rn(mul_rn(dot, own.scale), own.bias);
    return own.off(p, t, dot, pre) ? 0.0f : pre;
}

// The coefficient of one latent of a token that counts, with what it costs.
DEVICE Share penalty_of(const EncodeParams &p, const Latent &own, float sign_weight, uint64_t t,
                        float dot, float reference, float mask) {
    const float pre = add_rn(mul_rn(dot, own.scale), own.bias);
    const bool off = own.off(p, t, dot, pre);
    Share share = own.share(off ? 0.0f : pre, reference, sign_weight, mask);
    if (off) share.coef = 0.0f;
    return share;
}

// z of a warp's finished tiles, whose first row in this lane is `token` and first column `latent`.
template <int TILES_M, int TILES_N>
DEVICE void write_latents(const EncodeParams &p, const Dots<TILES_M, TILES_N> &dots, uint64_t token,
                          uint32_t latent) {
    bool counts[TILES_M][2];
    UNROLL
    for (int m = 0; m < TILES_M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint64_t t = token + 16 * m + 8 * half;
            counts[m][half] = t < p.tokens && mask_of(p.mask, t) != 0.0f;
        }
    }
    UNROLL
    for (int n = 0; n < TILES_N; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t k = latent + 8 * n + i;
            if (k >= p.rows.count) continue;
            Latent own;
            own.load(p.rows, k);
            UNROLL
            for (int m = 0; m < TILES_M; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const uint64_t t = token + 16 * m + 8 * half;
                    if (t >= p.tokens) continue;
                    const float dot = dots.total[m][n][2 * half + i];
                    // A token that does not count has no threshold.
                    const float z = counts[m][half] ? latent_of(p, own, t, dot) : 0.0f;
                    p.latents[t * p.latents_stride + k] = z;
                }
            }
        }
    }
}

// Coefficients of a warp's finished tiles, and to lanes 0 to 3 of each column its loss:
// losses[8n + 2q + i].
template <int TILES_M, int TILES_N>
DEVICE void write_penalty(const EncodeParams &p, const Dots<TILES_M, TILES_N> &dots, uint64_t token,
                          uint32_t latent, double *losses) {
    const uint32_t lane = thread_index() % 32;
    float mask[TILES_M][2];
    UNROLL
    for (int m = 0; m < TILES_M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint64_t t = token + 16 * m + 8 * half;
            mask[m][half] = t < p.tokens ? mask_of(p.mask, t) : 0.0f;
        }
    }
    UNROLL
    for (int n = 0; n < TILES_N; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t k = latent + 8 * n + i;
            double loss = 0.0;
            if (k < p.rows.count) {
                Latent own;
                own.load(p.rows, k);
                const float sign_weight = p.rows.sign_weight[k];
                UNROLL
                for (int m = 0; m < TILES_M; m++) {
                    UNROLL
                    for (int half = 0; half < 2; half++) {
                        const uint64_t t = token + 16 * m + 8 * half;
                        if (t >= p.tokens) continue;
                        float coef = 0.0f;
                        if (mask[m][half] != 0.0f) {
                            const float dot = dots.total[m][n][2 * half + i];
                            if (p.dots) p.dots[t * p.dots_stride + k] = dot;
                            const float reference = p.reference[t * p.reference_stride + k];
                            const Share share =
                                penalty_of(p, own, sign_weight, t, dot, reference, mask[m][half]);
                            coef = share.coef;
                            loss = add_rn(loss, share.loss);
                        }
                        if (p.coef) p.coef[t * p.coef_stride + k] = coef;
                    }
                }
            }
            if (p.loss_partials) {
                UNROLL
                for (uint32_t lanes = 4; lanes < 32; lanes *= 2) {
                    loss = add_rn(loss, shuffle_xor(loss, lanes));
                }
                if (lane < 4) losses[8 * n + 2 * lane + i] = loss;
            }
        }
    }
}

// The sums of a tile of tokens from those of its WARPS rows of warps, in turn, by the block's first
// LATENTS threads.
template <int WARPS, int LATENTS>
DEVICE void write_losses(const EncodeParams &p, const double *losses, uint64_t tile,
                         uint32_t first_latent) {
    const uint32_t k = first_latent + thread_index();
    if (thread_index() >= LATENTS || k >= p.rows.count) return;
    double loss = 0.0;
    UNROLL
    for (int i = 0; i < WARPS; i++) loss = add_rn(loss, losses[i * LATENTS + thread_index()]);
    p.loss_partials[tile * p.rows.padded_count + k] = loss;
}
