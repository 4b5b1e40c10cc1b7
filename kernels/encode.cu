// Latents of every token, or the penalty's coefficients and loss.
//
//   dot[t, k] = a_t · Σ_i W[k, i] · h[t, i],   a_t = 1 unless a norm gives it
//   pre = scale_k · dot + bias_k,   z = off ? 0 : pre
//   off: never | pre <= 0 | pre <= threshold_k | dot + gate_bias_k <= 0 or pre <= 0
//        | rank(gain_k · pre) <= threshold[t, group_k], rank as in topk.cu   (NaN: on)
//   r = s_k · (z − reference) <= 0 ? 0 : s_k · (z − reference)
//   coef[t, k] = off ? 0 : mask_t · 2 · s_k · w_k · r · scale_k
//   loss[k] = Σ_t mask_t · w_k · r²
//
// Parallelisation: a CTA takes a tile of tokens × latents through all columns, 64 at a time, in a
// pipeline of asynchronous copies. Up to 32 latents: 64 tokens × all latents in four warps, so that
// h is read once; with tokens to spare 128 (f16, bf16), so that packed rows are read less often.
// More latents: 128 × 64 (f32: 64 × 64) in eight warps; CTAs that share tokens are neighbours, so h
// comes from memory once and from the second-level cache after that. A tile of masked tokens reads
// nothing.
// Bytes moved: h once (less the rows of masked tokens), the packed rows (6 · K · d, cached) once
// for each tile of tokens, reference and coefficients 4 · T · K each.
// Determinism: 64 columns are one chain of mma, smallest products first, that starts at zero; eight
// chains are added in order to a group, and groups in order to the sum. So dot has the same bits in
// every kernel here, whatever the tile or the other tokens and latents. Losses are summed in f64
// along a fixed tree within a tile; reduce.cu adds up the tiles.
// A NaN in h makes all latents of its token NaN. So may an infinity: its products with the terms of
// one weight can have both signs.
#include "device.cuh"
#include "latent.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr int SHARED_MOST = 96 << 10;
// Chains of a group.
constexpr uint32_t GROUP = 8;

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

template <typename H, int WARPS_M_, int WARPS_N_, int TILES_M_, int TILES_N_>
struct Shape {
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    // Tiles of an mma, 16 × 8, of each warp.
    static constexpr int TILES_M = TILES_M_, TILES_N = TILES_N_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int TOKENS = 16 * TILES_M * WARPS_M;
    static constexpr int LATENTS = 8 * TILES_N * WARPS_N;
    static constexpr int HIDDEN_ROW = SLICE * H::BYTES;
    static constexpr int HIDDEN_BYTES = TOKENS * HIDDEN_ROW;
    static constexpr int TERM_BYTES = LATENTS * ROW_BYTES;
    static constexpr int STAGE = HIDDEN_BYTES + WEIGHT_TERMS * TERM_BYTES;
    static constexpr int FIT = SHARED_MOST / STAGE;
    static constexpr int STAGES = FIT < 6 ? FIT : 6;
};

// The copies of one thread into a stage.
template <typename H, typename S>
struct Loader {
    static constexpr int CHUNKS = S::HIDDEN_ROW / 16;
    static constexpr int ROW_STEP = S::THREADS / CHUNKS;
    static constexpr int ROWS = S::TOKENS / ROW_STEP;

    const EncodeParams &p;
    uint64_t first_token;
    uint32_t first_latent;
    // Bit i: row i of this thread is there and counts.
    uint32_t live;

    DEVICE_MEMBER Loader(const EncodeParams &p, uint64_t first_token, uint32_t first_latent);

    DEVICE_MEMBER void stage(unsigned char *to, uint32_t slice) const {
        hidden(to, slice);
        weights(to + S::HIDDEN_BYTES, slice);
    }

    DEVICE_MEMBER void hidden(unsigned char *to, uint32_t slice) const {
        const uint32_t chunk = thread_index() % CHUNKS, row = thread_index() / CHUNKS;
        const uint32_t start = slice * SLICE + chunk * (16 / H::BYTES);
        const uint32_t left = start < p.rows.d_in ? (p.rows.d_in - start) * H::BYTES : 0;
        const uint32_t bytes = left < 16 ? left : 16;
        const uint64_t row_bytes = p.hidden.stride * H::BYTES;
        const unsigned char *from =
            p.hidden.data + (first_token + row) * row_bytes + (uint64_t)start * H::BYTES;
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            const uint32_t r = row + i * ROW_STEP;
            unsigned char *at = to + r * S::HIDDEN_ROW + hidden_swizzle<H>(r, chunk);
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

    DEVICE_MEMBER void weights(unsigned char *to, uint32_t slice) const {
        constexpr int ALL = WEIGHT_TERMS * S::LATENTS * 8;
        UNROLL
        for (int n = 0; n < (ALL + S::THREADS - 1) / S::THREADS; n++) {
            const uint32_t i = n * S::THREADS + thread_index();
            if (ALL % S::THREADS != 0 && i >= ALL) break;
            const uint32_t term = i / (S::LATENTS * 8), k = first_latent + i / 8 % S::LATENTS;
            const bool there = k < p.rows.padded_count;
            const uint64_t row = packed_row(p.rows.padded_count, slice, term, k) + i % 8 * 16;
            copy_async(to + i * 16, p.rows.packed + (there ? row : 0), there ? 16 : 0);
        }
    }
};

// a_t
DEVICE float scale_of(const EncodeParams &p, uint64_t t) {
    return p.token_scales ? p.token_scales[t] : 1.0f;
}

template <typename H, typename S>
DEVICE_MEMBER Loader<H, S>::Loader(const EncodeParams &p, uint64_t first_token,
                                   uint32_t first_latent)
    : p(p), first_token(first_token), first_latent(first_latent), live(0) {
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        const uint64_t t = first_token + thread_index() / CHUNKS + i * ROW_STEP;
        if (t < p.tokens && mask_of(p.mask, t) != 0.0f) live |= 1u << i;
    }
}

// A warp's dot products: TILES_M × TILES_N accumulators.
template <typename H, typename S>
struct Dots {
    float total[S::TILES_M][S::TILES_N][4];
    float group[S::TILES_M][S::TILES_N][4];

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int m = 0; m < S::TILES_M; m++) {
            UNROLL
            for (int n = 0; n < S::TILES_N; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) total[m][n][i] = group[m][n][i] = 0.0f;
            }
        }
    }

    DEVICE_MEMBER void end_group() {
        UNROLL
        for (int m = 0; m < S::TILES_M; m++) {
            UNROLL
            for (int n = 0; n < S::TILES_N; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    total[m][n][i] = add_rn(total[m][n][i], group[m][n][i]);
                    group[m][n][i] = 0.0f;
                }
            }
        }
    }

    // One slice: the warp's rows of h from `hidden` on, its latents from `weights` on.
    DEVICE_MEMBER void add(const unsigned char *hidden, const unsigned char *weights) {
        const uint32_t lane = thread_index() % 32, g = lane / 4, q = lane % 4;
        uint32_t a[S::TILES_M][H::TERMS][4][4];
        UNROLL
        for (int m = 0; m < S::TILES_M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const uint32_t r = 16 * m + g;
                Eight<H> low, high;
                low.load(hidden + r * S::HIDDEN_ROW, r, half, q);
                high.load(hidden + (r + 8) * S::HIDDEN_ROW, r + 8, half, q);
                UNROLL
                for (int term = 0; term < H::TERMS; term++) {
                    UNROLL
                    for (int step = 0; step < 2; step++) {
                        uint32_t(&x)[4] = a[m][term][2 * half + step];
                        x[0] = low.terms[term][2 * step];
                        x[1] = high.terms[term][2 * step];
                        x[2] = low.terms[term][2 * step + 1];
                        x[3] = high.terms[term][2 * step + 1];
                    }
                }
            }
        }
        UNROLL
        for (int n = 0; n < S::TILES_N; n++) {
            uint32_t b[WEIGHT_TERMS][4][2];
            UNROLL
            for (int term = 0; term < WEIGHT_TERMS; term++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const uint32_t row = 8 * n + lane % 8;
                    uint32_t r[4];
                    ldmatrix(r, weights + term * S::TERM_BYTES + row * ROW_BYTES +
                                    swizzle(row, 4 * half + lane / 8));
                    b[term][2 * half][0] = r[0];
                    b[term][2 * half][1] = r[1];
                    b[term][2 * half + 1][0] = r[2];
                    b[term][2 * half + 1][1] = r[3];
                }
            }
            UNROLL
            for (int m = 0; m < S::TILES_M; m++) {
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                chain<4>(c, a[m], b);
                UNROLL
                for (int i = 0; i < 4; i++) group[m][n][i] = add_rn(group[m][n][i], c[i]);
            }
        }
    }
};

template <typename H, typename S>
DEVICE void write_latents(const EncodeParams &p, const Dots<H, S> &dots, uint64_t token,
                          uint32_t latent) {
    float scale[S::TILES_M][2];
    bool counts[S::TILES_M][2];
    UNROLL
    for (int m = 0; m < S::TILES_M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint64_t t = token + 16 * m + 8 * half;
            counts[m][half] = t < p.tokens && mask_of(p.mask, t) != 0.0f;
            scale[m][half] = counts[m][half] ? scale_of(p, t) : 0.0f;
        }
    }
    UNROLL
    for (int n = 0; n < S::TILES_N; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t k = latent + 8 * n + i;
            if (k >= p.rows.count) continue;
            Latent own;
            own.load(p.rows, k);
            UNROLL
            for (int m = 0; m < S::TILES_M; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const uint64_t t = token + 16 * m + 8 * half;
                    if (t >= p.tokens) continue;
                    const float dot = mul_rn(dots.total[m][n][2 * half + i], scale[m][half]);
                    const float pre = add_rn(mul_rn(dot, own.scale), own.bias);
                    // A token that does not count has no threshold.
                    const bool on = counts[m][half] && !own.off(p, t, dot, pre);
                    p.latents[t * p.latents_stride + k] = on ? pre : 0.0f;
                }
            }
        }
    }
}

// Coefficients, and the losses of each latent over the tile.
template <typename H, typename S>
DEVICE void write_penalty(const EncodeParams &p, const Dots<H, S> &dots, uint64_t token,
                          uint32_t latent, double *scratch) {
    const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
    float mask[S::TILES_M][2], scale[S::TILES_M][2];
    UNROLL
    for (int m = 0; m < S::TILES_M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const uint64_t t = token + 16 * m + 8 * half;
            mask[m][half] = t < p.tokens ? mask_of(p.mask, t) : 0.0f;
            scale[m][half] = t < p.tokens ? scale_of(p, t) : 0.0f;
        }
    }
    UNROLL
    for (int n = 0; n < S::TILES_N; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t k = latent + 8 * n + i;
            double loss = 0.0;
            if (k < p.rows.count) {
                Latent own;
                own.load(p.rows, k);
                const float sign_weight = p.rows.sign_weight[k];
                UNROLL
                for (int m = 0; m < S::TILES_M; m++) {
                    UNROLL
                    for (int half = 0; half < 2; half++) {
                        const uint64_t t = token + 16 * m + 8 * half;
                        if (t >= p.tokens) continue;
                        float coef = 0.0f;
                        if (mask[m][half] != 0.0f) {
                            const float dot =
                                mul_rn(dots.total[m][n][2 * half + i], scale[m][half]);
                            if (p.dots) p.dots[t * p.dots_stride + k] = dot;
                            const float pre = add_rn(mul_rn(dot, own.scale), own.bias);
                            const bool off = own.off(p, t, dot, pre);
                            const float reference = p.reference[t * p.reference_stride + k];
                            const Share share =
                                own.share(off ? 0.0f : pre, reference, sign_weight, mask[m][half]);
                            if (!off) coef = share.coef;
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
                const uint32_t own = warp % S::WARPS_N * S::TILES_N * 8 + 8 * n + 2 * lane + i;
                if (lane < 4) scratch[warp / S::WARPS_N * S::LATENTS + own] = loss;
            }
        }
    }
}

template <typename H, typename S>
DEVICE void encode(const EncodeParams &p) {
    unsigned char *shared = shared_memory();
    const uint32_t latent_tiles = (p.rows.count + S::LATENTS - 1) / S::LATENTS;
    const uint64_t token_tile = block_index() / latent_tiles;
    const uint64_t first_token = token_tile * S::TOKENS;
    const uint32_t first_latent = block_index() % latent_tiles * S::LATENTS;
    const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
    const uint32_t warp_token = warp / S::WARPS_N * S::TILES_M * 16;
    const uint32_t warp_latent = warp % S::WARPS_N * S::TILES_N * 8;

    const Loader<H, S> loader(p, first_token, first_latent);
    uint32_t slices = (p.rows.d_in + SLICE - 1) / SLICE;
    // Where no token counts there is nothing to multiply.
    if (p.mask.data && !any_in_block(loader.live != 0)) slices = 0;
    Dots<H, S> dots;
    dots.clear();
    uint32_t use = 0, fill = 0;
    // Copies run STAGES - 1 slices ahead.
    NO_UNROLL
    for (uint32_t step = 0; step < slices + S::STAGES - 1; step++) {
        const bool filled = step >= S::STAGES - 1;
        if (filled) {
            copy_wait<S::STAGES - 2>();
            // Everyone's copies have arrived, and everyone is done with the stage to fill.
            sync_block();
        }
        if (step < slices) loader.stage(shared + fill * S::STAGE, step);
        copy_commit();
        fill = fill + 1 == S::STAGES ? 0 : fill + 1;
        if (!filled) continue;
        const unsigned char *stage = shared + use * S::STAGE;
        dots.add(stage + warp_token * S::HIDDEN_ROW,
                 stage + S::HIDDEN_BYTES + warp_latent * ROW_BYTES);
        if ((step - (S::STAGES - 1)) % GROUP == GROUP - 1) dots.end_group();
        use = use + 1 == S::STAGES ? 0 : use + 1;
    }
    dots.end_group();

    const uint64_t token = first_token + warp_token + lane / 4;
    const uint32_t latent = first_latent + warp_latent + 2 * (lane % 4);
    if (p.latents) return write_latents(p, dots, token, latent);

    double *scratch = reinterpret_cast<double *>(shared);
    // The last stages are no longer read.
    sync_block();
    write_penalty(p, dots, token, latent, scratch);
    if (!p.loss_partials) return;
    if (p.mask.data && first_latent == 0 && warp == 0) write_count<S::TOKENS>(p, first_token, token_tile);
    sync_block();
    const uint32_t k = first_latent + thread_index();
    if (thread_index() < S::LATENTS && k < p.rows.count) {
        double loss = 0.0;
        UNROLL
        for (int i = 0; i < S::WARPS_M; i++) {
            loss = add_rn(loss, scratch[i * S::LATENTS + thread_index()]);
        }
        p.loss_partials[token_tile * p.rows.padded_count + k] = loss;
    }
}

} // namespace

// Up to 32 latents, of 64 or 128 tokens.
#define FEW(name, H, latents)                                                                      \
    KERNEL(name, EncodeParams, 128, 1) { encode<H, Shape<H, 4, 1, 1, latents / 8>>(p); }
#define TALL(name, H, latents)                                                                     \
    KERNEL(name, EncodeParams, 128, 1) { encode<H, Shape<H, 4, 1, 2, latents / 8>>(p); }
#define WIDE(name, H, tiles_m)                                                                     \
    KERNEL(name, EncodeParams, 256, 1) { encode<H, Shape<H, 4, 2, tiles_m, 4>>(p); }

FEW(blockem_encode_f32_8, F32, 8)
FEW(blockem_encode_f32_16, F32, 16)
FEW(blockem_encode_f32_24, F32, 24)
FEW(blockem_encode_f32_32, F32, 32)
WIDE(blockem_encode_f32_wide, F32, 1)
FEW(blockem_encode_f16_8, F16, 8)
FEW(blockem_encode_f16_16, F16, 16)
FEW(blockem_encode_f16_24, F16, 24)
FEW(blockem_encode_f16_32, F16, 32)
TALL(blockem_encode_f16_8_tall, F16, 8)
TALL(blockem_encode_f16_16_tall, F16, 16)
TALL(blockem_encode_f16_24_tall, F16, 24)
TALL(blockem_encode_f16_32_tall, F16, 32)
WIDE(blockem_encode_f16_wide, F16, 2)
FEW(blockem_encode_bf16_8, Bf16, 8)
FEW(blockem_encode_bf16_16, Bf16, 16)
FEW(blockem_encode_bf16_24, Bf16, 24)
FEW(blockem_encode_bf16_32, Bf16, 32)
TALL(blockem_encode_bf16_8_tall, Bf16, 8)
TALL(blockem_encode_bf16_16_tall, Bf16, 16)
TALL(blockem_encode_bf16_24_tall, Bf16, 24)
TALL(blockem_encode_bf16_32_tall, Bf16, 32)
WIDE(blockem_encode_bf16_wide, Bf16, 2)
