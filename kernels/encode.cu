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
// Determinism: 64 columns are one chain of mma, smallest products first, that starts at zero, and
// chains are added in an order that d decides (encode.cuh). So dot has the same bits in every kernel
// here, whatever the tile or the other tokens and latents. Losses are summed in f64 along a fixed
// tree within a tile; reduce.cu adds up the tiles.
// A NaN in h makes all latents of its token NaN. So may an infinity: its products with the terms of
// one weight can have both signs.
#include "encode.cuh"

namespace {

constexpr int SHARED_MOST = 96 << 10;

template <typename H, int WARPS_M_, int WARPS_N_, int TILES_M_, int TILES_N_>
struct Shape {
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    // Tiles of an mma, 16 × 8, of each warp.
    static constexpr int TILES_M = TILES_M_, TILES_N = TILES_N_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int TOKENS = 16 * TILES_M * WARPS_M;
    static constexpr int LATENTS = 8 * TILES_N * WARPS_N;
    static constexpr int HIDDEN_BYTES = TOKENS * HIDDEN_ROW<H>;
    static constexpr int TERM_BYTES = LATENTS * ROW_BYTES;
    static constexpr int STAGE = HIDDEN_BYTES + WEIGHT_TERMS * TERM_BYTES;
    static constexpr int FIT = SHARED_MOST / STAGE;
    static constexpr int STAGES = FIT < 6 ? FIT : 6;
    using Sums = Dots<TILES_M, TILES_N>;
};

// One thread's copies of packed rows from `first_latent` on.
template <typename S>
DEVICE void load_weights(const RowsParams &rows, unsigned char *to, uint32_t slice,
                         uint32_t first_latent) {
    constexpr int ALL = WEIGHT_TERMS * S::LATENTS * 8;
    UNROLL
    for (int n = 0; n < (ALL + S::THREADS - 1) / S::THREADS; n++) {
        const uint32_t i = n * S::THREADS + thread_index();
        if (ALL % S::THREADS != 0 && i >= ALL) break;
        const uint32_t term = i / (S::LATENTS * 8), k = first_latent + i / 8 % S::LATENTS;
        const bool there = k < rows.padded_count;
        const uint64_t row = packed_row(rows.padded_count, slice, term, k) + i % 8 * 16;
        copy_async(to + i * 16, rows.packed + (there ? row : 0), there ? 16 : 0);
    }
}

// The B of four steps: a slice of the packed rows 8n to 8n + 7 from `weights` on.
template <typename S>
DEVICE void load_columns(uint32_t (&b)[WEIGHT_TERMS][4][2], const unsigned char *weights, int n) {
    const uint32_t lane = thread_index() % 32, row = 8 * n + lane % 8;
    UNROLL
    for (int term = 0; term < WEIGHT_TERMS; term++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint32_t r[4];
            ldmatrix(r, weights + term * S::TERM_BYTES + row * ROW_BYTES +
                            swizzle(row, 4 * half + lane / 8));
            b[term][2 * half][0] = r[0];
            b[term][2 * half][1] = r[1];
            b[term][2 * half + 1][0] = r[2];
            b[term][2 * half + 1][1] = r[3];
        }
    }
}

// The chains of one slice: a warp's rows of h from `hidden` on, its latents from `weights` on.
template <typename H, typename S>
DEVICE void add_slice(typename S::Sums &dots, const unsigned char *hidden,
                      const unsigned char *weights) {
    // Rows of several terms would take too many registers side by side, and the compiler would bring
    // them there but for the barrier.
    constexpr int ROWS = H::TERMS == 1 ? S::TILES_M : 1;
    UNROLL
    for (int first = 0; first < S::TILES_M; first += ROWS) {
        if (first > 0) sync_warp();
        uint32_t a[ROWS][H::TERMS][4][4];
        UNROLL
        for (int m = 0; m < ROWS; m++) {
            load_rows<H>(a[m], hidden + 16 * (first + m) * HIDDEN_ROW<H>);
        }
        UNROLL
        for (int n = 0; n < S::TILES_N; n++) {
            uint32_t b[WEIGHT_TERMS][4][2];
            load_columns<S>(b, weights, n);
            UNROLL
            for (int m = 0; m < ROWS; m++) {
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                chain<ENCODE_LEVEL>(c, a[m], b);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    float &part = dots.part[first + m][n][i];
                    part = add_rn(part, c[i]);
                }
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

    HiddenLoader<H, S::THREADS, S::TOKENS> hidden = {p, thread_index(), first_token, 0};
    hidden.live = hidden.live_from(first_token);
    uint32_t slices = (p.rows.d_in + SLICE - 1) / SLICE;
    // Where no token counts there is nothing to multiply.
    if (p.mask.data && !any_in_block(hidden.live != 0)) slices = 0;
    typename S::Sums dots;
    dots.begin(slices);
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
        if (step < slices) {
            unsigned char *stage = shared + fill * S::STAGE;
            hidden.load(stage, step);
            load_weights<S>(p.rows, stage + S::HIDDEN_BYTES, step, first_latent);
        }
        copy_commit();
        fill = fill + 1 == S::STAGES ? 0 : fill + 1;
        if (!filled) continue;
        const unsigned char *stage = shared + use * S::STAGE;
        dots.reach(step - (S::STAGES - 1));
        add_slice<H, S>(dots, stage + warp_token * HIDDEN_ROW<H>,
                        stage + S::HIDDEN_BYTES + warp_latent * ROW_BYTES);
        use = use + 1 == S::STAGES ? 0 : use + 1;
    }

    const uint64_t token = first_token + warp_token + lane / 4;
    const uint32_t latent = first_latent + warp_latent + 2 * (lane % 4);
    dots.finish(p, token);
    if (p.latents) return write_latents(p, dots, token, latent);

    double *losses = reinterpret_cast<double *>(shared);
    // The last stages are no longer read.
    sync_block();
    write_penalty(p, dots, token, latent, losses + warp / S::WARPS_N * S::LATENTS + warp_latent);
    if (!p.loss_partials) return;
    if (p.mask.data && first_latent == 0 && warp == 0) {
        write_count<S::TOKENS>(p, first_token, token_tile);
    }
    sync_block();
    write_losses<S::WARPS_M, S::LATENTS>(p, losses, token_tile, first_latent);
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
