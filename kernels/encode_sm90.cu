// Latents of every token, or the penalty's coefficients and loss, of any number of latents, on devices
// of compute capability 9.0. The formulas are those of encode.cu.
//
// Parallelisation: a block takes 128 tokens × 64 latents through all columns, 64 at a time; the blocks
// of a cluster take the same latents of tokens that follow each other. Each of two warpgroups copies
// its own 64 hidden states and multiplies them; while one adds up a chain the other's products run. A
// ninth warp brings packed rows: each block of the cluster copies a share of a slice to all of them.
// Bytes moved: h once (less the rows of masked tokens) for each 64 latents, cached, since blocks of the
// same tokens are neighbours; packed rows (6 · K · d, cached) once for each cluster; reference and
// coefficients 4 · T · K each.
// Determinism: the order of encode.cuh's sums; losses are summed in f64 along a fixed tree within a
// tile, and reduce.cu adds up the tiles.
#include "encode.cuh"
#include "sm90.cuh"

namespace {

constexpr int GROUPS = 2;
// The last warp brings packed rows: one thread of it.
constexpr int THREADS = GROUPS * GROUP_THREADS + 32;
constexpr int WARPS = GROUPS * 4;
constexpr int TOKENS = GROUPS * GROUP_TOKENS;
constexpr int LATENTS = 64;
constexpr int TILES_N = LATENTS / 8;
constexpr int TERM_BYTES = LATENTS * ROW_BYTES;
constexpr int WEIGHT_BYTES = WEIGHT_TERMS * TERM_BYTES;
constexpr int LOSS_BYTES = WARPS * LATENTS * 8;

template <typename H>
constexpr int GROUP_BYTES = GROUP_TOKENS *HIDDEN_ROW<H>;
template <typename H>
constexpr int STAGE = WEIGHT_BYTES + GROUPS * GROUP_BYTES<H>;
template <typename H>
constexpr int STAGES = H::BYTES == 4 ? 3 : 5;

// Whether a token of the cluster's tiles counts.
DEVICE bool any_counts(const EncodeParams &p, uint64_t first_token) {
    if (!p.mask.data) return true;
    bool counts = false;
    for (uint32_t i = thread_index(); i < cluster_size() * TOKENS; i += THREADS) {
        const uint64_t t = first_token + i;
        if (t < p.tokens && mask_of(p.mask, t) != 0.0f) counts = true;
    }
    return any_in_block(counts);
}

template <typename H>
DEVICE void encode(const EncodeParams &p) {
    unsigned char *shared = shared_memory();
    double *losses = reinterpret_cast<double *>(shared + STAGES<H> * STAGE<H>);
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + STAGES<H> * STAGE<H> + LOSS_BYTES);
    uint64_t *empty = full + STAGES<H>;
    const uint32_t rank = cluster_rank(), blocks = cluster_size();
    const uint32_t latent_tiles = (p.rows.count + LATENTS - 1) / LATENTS;
    const uint32_t cluster = block_index() / blocks;
    const uint32_t first_latent = cluster % latent_tiles * LATENTS;
    const uint64_t cluster_tile = (uint64_t)(cluster / latent_tiles) * blocks;
    const uint64_t token_tile = cluster_tile + rank, first_token = token_tile * TOKENS;
    const uint32_t warp = thread_index() / 32, lane = thread_index() % 32;
    const uint32_t group = warp / 4;

    wait_for_the_one_before();
    uint32_t slices = (p.rows.d_in + SLICE - 1) / SLICE;
    // Where no token counts there is nothing to multiply.
    if (!any_counts(p, cluster_tile * TOKENS)) slices = 0;
    if (thread_index() == 0) {
        for (int i = 0; i < STAGES<H>; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, blocks * WARPS);
        }
        barriers_are_set();
    }
    sync_cluster();

    Dots<1, TILES_N> dots;
    dots.begin(slices);
    if (group == GROUPS) {
        // Rows from here on, and of this block's share.
        const uint32_t rows = p.rows.padded_count - first_latent < LATENTS
                                  ? p.rows.padded_count - first_latent
                                  : LATENTS;
        const uint32_t share = LATENTS / blocks, first = rank * share;
        const uint32_t own = first >= rows ? 0 : rows - first < share ? rows - first : share;
        uint32_t stage = 0, round = 0;
        for (uint32_t slice = 0; lane == 0 && slice < slices; slice++) {
            // Every block of the cluster is done with the stage to fill.
            if (round > 0) barrier_wait(empty + stage, (round - 1) % 2);
            barrier_expect(full + stage, WEIGHT_TERMS * rows * ROW_BYTES);
            for (uint32_t term = 0; own > 0 && term < WEIGHT_TERMS; term++) {
                const uint64_t from =
                    packed_row(p.rows.padded_count, slice, term, first_latent + first);
                unsigned char *to =
                    shared + stage * STAGE<H> + term * TERM_BYTES + first * ROW_BYTES;
                copy_bulk_to_all(to, p.rows.packed + from, own * ROW_BYTES, full + stage);
            }
            if (++stage == STAGES<H>) stage = 0, round++;
        }
        if (lane == 0) wait_until_empty<STAGES<H>>(empty, slices);
    } else {
        const uint32_t thread = thread_index() % GROUP_THREADS;
        HiddenLoader<H, GROUP_THREADS, GROUP_TOKENS> hidden = {
            p, thread, first_token + group * GROUP_TOKENS, 0};
        hidden.live = hidden.live_from(hidden.first_token);
        const bool any = any_in_group(group, hidden.live != 0);
        unsigned char *own = shared + WEIGHT_BYTES + group * GROUP_BYTES<H>;
        UNROLL
        for (int i = 0; i < STAGES<H> - 1; i++) {
            if (i < slices) hidden.load(own + i * STAGE<H>, i);
            copy_commit();
        }
        uint32_t use = 0, fill = STAGES<H> - 1, round = 0;
        NO_UNROLL
        for (uint32_t slice = 0; slice < slices; slice++) {
            copy_wait<STAGES<H> - 2>();
            // The group's copies have arrived, and it is done with the stage to fill.
            sync_group(group);
            const uint32_t next = slice + STAGES<H> - 1;
            if (next < slices) hidden.load(own + fill * STAGE<H>, next);
            copy_commit();
            fill = fill + 1 == STAGES<H> ? 0 : fill + 1;
            float c[TILES_N][4] = {};
            barrier_wait(full + use, round % 2);
            if (any) {
                uint32_t a[H::TERMS][4][4];
                load_rows<H>(a, own + use * STAGE<H> + warp % 4 * 16 * HIDDEN_ROW<H>);
                const uint64_t b = rows_in_shared(shared + use * STAGE<H>);
                products_begin(c, a);
                in_order<ENCODE_LEVEL, H::TERMS, WEIGHT_TERMS, 4>([&](int i, int j, int step) {
                    products(c, a[i][step], step_on(b, j * TERM_BYTES + 32 * step));
                });
                products_end(c);
            }
            // All lanes have seen this phase of the barrier: with the arrival the next may come.
            sync_warp();
            if (lane < blocks) barrier_arrive(empty + use, lane);
            dots.reach(slice);
            add(dots.part[0], c);
            if (++use == STAGES<H>) use = 0, round++;
        }
        const uint64_t token = first_token + warp * 16 + lane / 4;
        const uint32_t latent = first_latent + 2 * (lane % 4);
        dots.finish(p, token);
        if (p.latents) write_latents(p, dots, token, latent);
        else write_penalty(p, dots, token, latent, losses + warp * LATENTS);
    }
    if (p.loss_partials) {
        sync_block();
        if (first_token < p.tokens) {
            write_losses<WARPS, LATENTS>(p, losses, token_tile, first_latent);
        }
        if (p.mask.data && first_latent == 0 && warp == 0 && first_token < p.tokens) {
            write_count<TOKENS>(p, first_token, token_tile);
        }
    }
}

} // namespace

SM90_KERNEL(blockem_encode_f32_sm90, EncodeParams, THREADS, encode<F32>)
SM90_KERNEL(blockem_encode_f16_sm90, EncodeParams, THREADS, encode<F16>)
SM90_KERNEL(blockem_encode_bf16_sm90, EncodeParams, THREADS, encode<Bf16>)
