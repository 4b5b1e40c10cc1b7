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
#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS_M = 4;
// Tiles of an mma, 16 × 8, of each warp: TILES_M × TILES_N.
constexpr int TILES_N = SLICE / 8;
constexpr int SLICES = 2;
constexpr int LATENTS = 32;
constexpr int TERM_BYTES = LATENTS * ROW_BYTES;

struct F32 {
    static constexpr uint32_t DTYPE = DTYPE_F32;
    static constexpr int BYTES = 4, TERMS = 3, LEVEL = 4, CHUNKS = CHUNKS_OF_8<DTYPE>;

    DEVICE_MEMBER static void store(Chunk (&chunks)[CHUNKS], const Row8 &x) {
        UNROLL
        for (int i = 0; i < 8; i++) chunks[i / 4].v[i % 4] = bits_of_float(x.v[i]);
    }
};

struct F16 {
    static constexpr uint32_t DTYPE = DTYPE_F16;
    static constexpr int BYTES = 2, TERMS = 2, LEVEL = 3, CHUNKS = CHUNKS_OF_8<DTYPE>;

    DEVICE_MEMBER static void store(Chunk (&chunks)[CHUNKS], const Row8 &x) {
        UNROLL
        for (int i = 0; i < 4; i++) chunks[0].v[i] = round_to_f16(x.v[2 * i], x.v[2 * i + 1]);
    }
};

struct Bf16 {
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

// A warp's sums: 32 tokens × 64 columns.
template <typename Out, int TILES_M>
struct Sums {
    float x[TILES_M][TILES_N][4];

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int m = 0; m < TILES_M; m++) {
            UNROLL
            for (int n = 0; n < TILES_N; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) x[m][n][i] = 0.0f;
            }
        }
    }

    // One chain: the coefficients as bf16 terms, the warp's slice of packed rows. Parts of 32
    // columns that the caller's rows do not have are left out.
    DEVICE_MEMBER void add(const uint32_t (&a)[TILES_M][Out::TERMS][2][4],
                           const unsigned char *weights, uint32_t columns) {
        const uint32_t lane = thread_index() % 32;
        UNROLL
        for (uint32_t n = 0; n < TILES_N; n++) {
            if (columns <= n / 4 * 32) continue;
            uint32_t b[Out::TERMS][2][2];
            UNROLL
            for (int term = 0; term < Out::TERMS; term++) {
                uint32_t r[4];
                ldmatrix_transposed(
                    r, weights + term * TERM_BYTES + lane * ROW_BYTES + swizzle(lane, n));
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
                for (int i = 0; i < 4; i++) x[m][n][i] = add_rn(x[m][n][i], c[i]);
            }
        }
    }

    // Columns 32 · part + 8q on of row `half` of tile m. The packed form makes them adjacent.
    DEVICE_MEMBER Row8 row(int m, int half, int part) const {
        Row8 out;
        UNROLL
        for (int i = 0; i < 8; i++) out.v[i] = x[m][4 * part + i / 2][2 * half + i % 2];
        return out;
    }
};

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
DEVICE void write(const GradientParams &p, const Sums<Out, TILES_M> &sums, const Place &place,
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
                Row8 sum = sums.row(m, half, part);
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
        Sums<Out, TILES_M> sums;
        sums.clear();
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
                sums.add(a, shared + use * STAGE + warp_slice * Out::TERMS * TERM_BYTES, columns);
            }
            use = use + 1 == STAGES ? 0 : use + 1;
            fill = fill + 1 == STAGES ? 0 : fill + 1;
        }
        // The four lanes of a row have seen its latents between them.
        active |= shuffle_xor(active, 1);
        active |= shuffle_xor(active, 2);
        write(p, sums, place, active);
        place.token += TOKENS;
    }
}

} // namespace

KERNEL(blockem_gradient_f32_few, GradientParams, THREADS, 1) { gradient<F32, true>(p); }
KERNEL(blockem_gradient_f32_wide, GradientParams, THREADS, 1) { gradient<F32, false>(p); }
KERNEL(blockem_gradient_f16_few, GradientParams, THREADS, 2) { gradient<F16, true>(p); }
KERNEL(blockem_gradient_f16_wide, GradientParams, THREADS, 1) { gradient<F16, false>(p); }
KERNEL(blockem_gradient_bf16_few, GradientParams, THREADS, 2) { gradient<Bf16, true>(p); }
KERNEL(blockem_gradient_bf16_wide, GradientParams, THREADS, 1) { gradient<Bf16, false>(p); }
