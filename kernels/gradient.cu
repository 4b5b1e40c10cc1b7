// dH from the penalty's coefficients.
//
//   dH[t, :] (+)= Σ_k factor · coef[t, k] · W[k, :] − pull[t] · (h[t, :] − mean[t])
//   factor = scale · scale_tensor; a coefficient or a pull of zero takes no part, whatever h is.
//   Only a norm pulls; norm.cu has multiplied the coefficients, too.
//
// Parallelisation: a CTA of eight warps takes tiles of tokens × 128 columns. Coefficients go from
// memory to registers, where they become bf16 terms; packed rows pass through shared memory, 32
// latents at a time. With up to 32 latents these stay there while the CTA walks down tiles of 64
// tokens; with more they come in a pipeline of asynchronous copies, for 128 tokens. A warp skips 32
// latents that none of its tokens violates.
// Bytes moved: dH written once (accumulate: rows with a violation are read and written, the others
// are not touched), coefficients 4 · T · K for every 128 columns and packed rows (4 · K · d, f32:
// 6 · K · d) for every few tiles of tokens, both cached. With a norm h once, where tokens pull.
// Determinism: 32 latents are one chain of mma, smallest products first, that starts at zero;
// chains are added in order. An f16 or bf16 result leaves out products below 2^-16 of the largest,
// which its rounding hides. Skipped chains would have added zero. A row depends on its own
// coefficients.
#include "gradient.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS_M = 4;
constexpr int SLICES = 2;
constexpr int LATENTS = 32;
constexpr int TERM_BYTES = LATENTS * ROW_BYTES;

// Adds a chain: the coefficients as bf16 terms, a slice of packed rows. Halves of it that the
// caller's rows do not have are left out.
template <typename Out, int TILES_M>
DEVICE void add_chain(Tiles<TILES_M> &sums, const uint32_t (&a)[TILES_M][Out::TERMS][2][4],
                      const unsigned char *weights, uint32_t columns) {
    const uint32_t lane = thread_index() % 32;
    UNROLL
    for (uint32_t n = 0; n < SLICE_TILES; n++) {
        if (columns <= n / 4 * 32) continue;
        uint32_t b[Out::TERMS][2][2];
        UNROLL
        for (int term = 0; term < Out::TERMS; term++) {
            uint32_t r[4];
            ldmatrix_transposed(r,
                                weights + term * TERM_BYTES + lane * ROW_BYTES + swizzle(lane, n));
            b[term][0][0] = r[0];
            b[term][0][1] = r[1];
            b[term][1][0] = r[2];
            b[term][1][1] = r[3];
        }
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            chain<Out::LEVEL>(c, a[m], b);
            UNROLL
            for (int i = 0; i < 4; i++) sums[m][n][i] = add_rn(sums[m][n][i], c[i]);
        }
    }
}

// The copies of one thread: 32 latents × 128 columns of packed rows, zeros where there are none.
template <typename Out>
DEVICE void load_weights(const GradientParams &p, unsigned char *to, uint32_t first_slice,
                         uint32_t latent) {
    constexpr int ALL = SLICES * Out::TERMS * LATENTS * 8;
    static_assert(ALL % THREADS == 0, "every thread copies as much");
    UNROLL
    for (int n = 0; n < ALL / THREADS; n++) {
        const uint32_t i = n * THREADS + thread_index();
        const uint32_t term = i / (LATENTS * 8) % Out::TERMS, k = latent + i / 8 % LATENTS;
        const uint32_t slice = first_slice + i / (LATENTS * 8 * Out::TERMS);
        const bool there = k < p.padded_count && slice * SLICE < p.d_in;
        const uint64_t row = packed_row(p.padded_count, slice, term, k) + i % 8 * 16;
        copy_async(to + i * 16, p.packed + (there ? row : 0), there ? 16 : 0);
    }
}

template <typename Out, bool FEW>
DEVICE void gradient(const GradientParams &p) {
    constexpr int STAGE = SLICES * Out::TERMS * TERM_BYTES;
    constexpr int STAGES = FEW ? 1 : 3;
    constexpr int TILES_M = FEW ? 1 : 2;
    constexpr int TOKENS = 16 * TILES_M * WARPS_M;
    unsigned char *shared = shared_memory();
    const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
    const uint32_t first_slice = block_index() % p.column_tiles * SLICES;
    const uint32_t warp_slice = warp / WARPS_M;
    const uint64_t first_token =
        (uint64_t)(block_index() / p.column_tiles) * p.tiles_per_cta * TOKENS;
    const double given = p.scale_tensor ? (double)*p.scale_tensor : 1.0;
    const float factor = (float)mul_rn(p.scale, given);
    const uint32_t rounds = FEW ? 1 : (p.count + LATENTS - 1) / LATENTS;

    UNROLL
    for (uint32_t i = 0; i < (FEW ? 1 : STAGES - 1); i++) {
        if (i < rounds) load_weights<Out>(p, shared + i * STAGE, first_slice, i * LATENTS);
        copy_commit();
    }
    Place place;
    place.column = (first_slice + warp_slice) * SLICE + lane % 4 * 8;
    place.token = first_token + warp % WARPS_M * 16 * TILES_M + lane / 4;
    const uint32_t slice_column = (first_slice + warp_slice) * SLICE;
    const uint32_t columns = slice_column < p.d_in ? p.d_in - slice_column : 0;
    Coefs<TILES_M> coefs;
    coefs.load(p, place.token, 0);
    if (FEW) {
        copy_wait<0>();
        sync_block();
    }
    NO_UNROLL
    for (uint32_t tile = 0; tile < p.tiles_per_cta; tile++) {
        if (first_token + (uint64_t)tile * TOKENS >= p.tokens) break;
        Tiles<TILES_M> sums = {};
        uint32_t active = 0, use = 0, fill = STAGES - 1;
        NO_UNROLL
        for (uint32_t round = 0; round < rounds; round++) {
            if (!FEW) {
                copy_wait<FEW ? 0 : STAGES - 2>();
                // Everyone's copies have arrived, and everyone is done with the stage to fill.
                sync_block();
                const uint32_t next = round + STAGES - 1;
                if (next < rounds) {
                    load_weights<Out>(p, shared + fill * STAGE, first_slice, next * LATENTS);
                }
                copy_commit();
            }
            const uint32_t now = coefs.active();
            active |= now;
            const bool any = any_in_warp(now != 0);
            uint32_t a[TILES_M][Out::TERMS][2][4];
            if (any) split_all<Out, TILES_M>(a, coefs, factor);
            // The next coefficients come while these are used.
            if (!FEW && round + 1 < rounds) coefs.load(p, place.token, (round + 1) * LATENTS);
            if (FEW && tile + 1 < p.tiles_per_cta) coefs.load(p, place.token + TOKENS, 0);
            if (any) {
                add_chain<Out, TILES_M>(
                    sums, a, shared + use * STAGE + warp_slice * Out::TERMS * TERM_BYTES, columns);
            }
            use = use + 1 == STAGES ? 0 : use + 1;
            fill = fill + 1 == STAGES ? 0 : fill + 1;
        }
        // The four lanes of a row have seen its latents between them.
        active |= shuffle_xor(active, 1);
        active |= shuffle_xor(active, 2);
        write_rows<Out, TILES_M>(p, sums, place, active);
        place.token += TOKENS;
    }
}

} // namespace

KERNEL(blockem_gradient_f32_few, GradientParams, THREADS, 1) { gradient<ToF32, true>(p); }
KERNEL(blockem_gradient_f32_wide, GradientParams, THREADS, 1) { gradient<ToF32, false>(p); }
KERNEL(blockem_gradient_f16_few, GradientParams, THREADS, 2) { gradient<ToF16, true>(p); }
KERNEL(blockem_gradient_f16_wide, GradientParams, THREADS, 1) { gradient<ToF16, false>(p); }
KERNEL(blockem_gradient_bf16_few, GradientParams, THREADS, 2) { gradient<ToBf16, true>(p); }
KERNEL(blockem_gradient_bf16_wide, GradientParams, THREADS, 1) { gradient<ToBf16, false>(p); }
