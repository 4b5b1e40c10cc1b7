// dH from the penalty's coefficients, of any number of latents, on devices of compute capability 9.0.
// The formula is that of gradient.cu.
//
// Parallelisation: a block takes 128 tokens × 128 columns through all latents, 32 at a time; the blocks
// of a cluster take the same columns of tokens that follow each other. Two warpgroups take 64 tokens
// each; while one adds up a chain the other's products run. Coefficients go from memory to registers,
// where they become bf16 terms. A third group brings packed rows: each block of the cluster copies a
// share of 32 latents to all of them. A warpgroup skips 32 latents that none of its tokens violates.
// Bytes moved: dH written once (accumulate: rows with a violation are read and written, the others
// are not touched), coefficients 4 · T · K for every 128 columns, cached, since blocks of the same
// tokens are neighbours; packed rows (4 · K · d, f32: 6 · K · d, cached) once for each cluster.
// Determinism: 32 latents are one chain, smallest products first, that starts at zero; chains are added
// in order. An f16 or bf16 result leaves out products below 2^-16 of the largest, which its rounding
// hides. Skipped chains would have added zero. A row depends on its own coefficients.
#include "gradient.cuh"
#include "sm90.cuh"

namespace {

constexpr int GROUPS = 2;
// The last group brings packed rows: one thread of it.
constexpr int THREADS = (GROUPS + 1) * GROUP_THREADS;
constexpr int WARPS = GROUPS * 4;
constexpr int TOKENS = GROUPS * GROUP_TOKENS;
constexpr int SLICES = 2;
constexpr int LATENTS = 32;
constexpr int TERM_BYTES = LATENTS * ROW_BYTES;
constexpr int STAGES = 6;

// A stage: of each slice all terms.
template <typename Out>
constexpr int SLICE_BYTES = Out::TERMS *TERM_BYTES;
template <typename Out>
constexpr int STAGE = SLICES *SLICE_BYTES<Out>;

// Copies this block's share of the packed rows of each 32 latents to all blocks of the cluster.
template <typename Out>
DEVICE void bring_rows(const GradientParams &p, unsigned char *shared, uint64_t *full,
                       uint64_t *empty, uint32_t first_slice, uint32_t rounds) {
    const uint32_t blocks = cluster_size(), share = LATENTS / blocks;
    const uint32_t first = cluster_rank() * share;
    const uint32_t slices = (first_slice + 1) * SLICE < p.d_in ? SLICES : 1;
    for (uint32_t n = 0; n < rounds; n++) {
        const uint32_t stage = n % STAGES;
        // Every block of the cluster is done with the stage to fill.
        if (n >= STAGES) barrier_wait(empty + stage, (n / STAGES - 1) % 2);
        const uint32_t left = p.padded_count - n * LATENTS;
        const uint32_t rows = left < LATENTS ? left : LATENTS;
        const uint32_t own = first >= rows ? 0 : rows - first < share ? rows - first : share;
        barrier_expect(full + stage, slices * Out::TERMS * rows * ROW_BYTES);
        for (uint32_t i = 0; own > 0 && i < slices * Out::TERMS; i++) {
            const uint32_t slice = first_slice + i / Out::TERMS, term = i % Out::TERMS;
            const uint64_t from = packed_row(p.padded_count, slice, term, n * LATENTS + first);
            unsigned char *to = shared + stage * STAGE<Out> + i * TERM_BYTES + first * ROW_BYTES;
            copy_bulk_to_all(to, p.packed + from, own * ROW_BYTES, full + stage);
        }
    }
    wait_until_empty<STAGES>(empty, rounds);
}

template <typename Out>
DEVICE void gradient(const GradientParams &p) {
    unsigned char *shared = shared_memory();
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + STAGES * STAGE<Out>);
    uint64_t *empty = full + STAGES;
    const uint32_t rank = cluster_rank(), blocks = cluster_size();
    const uint32_t cluster = block_index() / blocks;
    const uint32_t first_slice = cluster % p.column_tiles * SLICES;
    const uint64_t first_token = ((uint64_t)(cluster / p.column_tiles) * blocks + rank) * TOKENS;
    const uint32_t warp = thread_index() / 32, lane = thread_index() % 32, group = warp / 4;
    const uint32_t rounds = (p.count + LATENTS - 1) / LATENTS;

    if (p.padded_count % LATENTS != 0) {
        // Coefficients of zero meet rows that are not there: these must be numbers.
        for (int i = thread_index(); i < STAGES * STAGE<Out> / 16; i += THREADS) {
            store_chunk(shared + 16 * i, Chunk{});
        }
        stores_before_products();
    }
    if (thread_index() == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, blocks * WARPS);
        }
        barriers_are_set();
    }
    sync_cluster();

    if (group == GROUPS) {
        give_registers<24>();
        if (thread_index() % GROUP_THREADS == 0) {
            bring_rows<Out>(p, shared, full, empty, first_slice, rounds);
        }
    } else {
        take_registers<240>();
        // Not before rows are on their way.
        wait_for_the_one_before();
        const double given = p.scale_tensor ? (double)*p.scale_tensor : 1.0;
        const float factor = (float)mul_rn(p.scale, given);
        const uint64_t token = first_token + warp * 16 + lane / 4;
        Tiles<1> sums[SLICES] = {};
        Coefs<1> coefs;
        coefs.load(p, token, 0);
        uint32_t active = 0, use = 0, round = 0;
        NO_UNROLL
        for (uint32_t n = 0; n < rounds; n++) {
            const uint32_t now = coefs.active();
            active |= now;
            const bool any = any_in_group(group, now != 0);
            uint32_t a[1][Out::TERMS][2][4];
            if (any) split_all<Out, 1>(a, coefs, factor);
            // The next coefficients come while these are used.
            if (n + 1 < rounds) coefs.load(p, token, (n + 1) * LATENTS);
            barrier_wait(full + use, round % 2);
            if (any) {
                UNROLL
                for (int slice = 0; slice < SLICES; slice++) {
                    float c[SLICE_TILES][4] = {};
                    const uint64_t b =
                        rows_in_shared(shared + use * STAGE<Out> + slice * SLICE_BYTES<Out>);
                    products_begin(c, a[0]);
                    in_order<Out::LEVEL, Out::TERMS, Out::TERMS, 2>([&](int i, int j, int step) {
                        products_transposed(c, a[0][i][step],
                                            step_on(b, j * TERM_BYTES + 16 * step * ROW_BYTES));
                    });
                    products_end(c);
                    add(sums[slice][0], c);
                }
            }
            // All lanes have seen this phase of the barrier: with the arrival the next may come.
            sync_warp();
            if (lane < blocks) barrier_arrive(empty + use, lane);
            if (++use == STAGES) use = 0, round++;
        }
        // The four lanes of a row have seen its latents between them.
        active |= shuffle_xor(active, 1);
        active |= shuffle_xor(active, 2);
        UNROLL
        for (int slice = 0; slice < SLICES; slice++) {
            const Place place = {token, (first_slice + slice) * SLICE + lane % 4 * 8};
            write_rows<Out, 1>(p, sums[slice], place, active);
        }
    }
}

} // namespace

SM90_KERNEL(blockem_gradient_f32_sm90, GradientParams, THREADS, gradient<ToF32>)
SM90_KERNEL(blockem_gradient_f16_sm90, GradientParams, THREADS, gradient<ToF16>)
SM90_KERNEL(blockem_gradient_bf16_sm90, GradientParams, THREADS, gradient<ToBf16>)
