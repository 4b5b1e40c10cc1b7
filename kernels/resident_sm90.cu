// Latents, the penalty and dH of up to 32 latents in one launch, on devices of compute capability 9.0.
// The formulas are those of encode.cu and gradient.cu.
//
// Parallelisation: a cluster of four or eight blocks takes tiles of 128 tokens, one after the other,
// and each of its blocks some of the eight parts of the columns. A block keeps the packed rows of its
// columns in shared memory from the first tile to the last, for latents and dH alike. Two warpgroups
// take 64 tokens each; copies of hidden states run ahead into the next tile while the blocks send each
// other what their parts have added up to, each block makes latents or coefficients of its share of
// the tokens, and sends these to all. Nothing but what is sent makes blocks wait for each other: sums
// of the next tile go to a block that has sent the coefficients of this one, and so has read its sums;
// coefficients go to warps that have sent sums, and so are done with the coefficients before.
// Bytes moved: h once (less the rows of masked tokens), dH once (accumulate: rows with a violation are
// read and written), packed rows once for each cluster (6 · K · d, cached), reference 4 · T · K, and
// coefficients or latents 4 · T · K where they are asked for.
// Determinism: the order of encode.cuh's sums, whatever the cluster; a block adds up the losses of its
// tokens in f64, tile by tile, and reduce.cu those of the blocks. dH is one chain.
#include "encode.cuh"
#include "gradient.cuh"
#include "sm90.cuh"

namespace {

constexpr int GROUPS = 2;
constexpr int THREADS = GROUPS * GROUP_THREADS;
constexpr int TOKENS = GROUPS * GROUP_TOKENS;
// What products with coefficients of zero read behind the last packed rows: any numbers will do, but
// they must be some.
constexpr int BEHIND = 1024;
// Pairs of latents that a thread makes of a tile: those of 32 tokens at most.
constexpr int OWN = 2;

// Until all but so many groups of copies have arrived.
DEVICE void copy_wait_all_but(uint32_t groups) {
    switch (groups) {
        case 0: return copy_wait<0>();
        case 1: return copy_wait<1>();
        case 2: return copy_wait<2>();
        case 3: return copy_wait<3>();
        default: return copy_wait<4>();
    }
}

template <typename H, typename Out, int LATENTS>
struct Resident {
    static constexpr int TILES_N = LATENTS / 8;
    static constexpr int TERM_BYTES = LATENTS * ROW_BYTES;
    static constexpr int SLICE_BYTES = WEIGHT_TERMS * TERM_BYTES;
    static constexpr int GROUP_BYTES = GROUP_TOKENS * HIDDEN_ROW<H>;
    // Steps of a product with coefficients.
    static constexpr int STEPS = (LATENTS + 15) / 16;

    const ResidentParams &p;
    // This block among those of its cluster, its share of a tile's tokens, and its columns.
    uint32_t rank, blocks, share, slices, first_part, first_slice, own_slices;
    // This thread's warpgroup, and its place there.
    uint32_t group, thread, warp, lane;
    unsigned char *weights, *hidden;
    // [PARTS, share, LATENTS] and [TOKENS, LATENTS]
    float *parts, *coefs;
    // What all parts, and all coefficients, of a tile arrive at; and the packed rows of each slice.
    uint64_t *have_parts, *have_coefs, *have_rows;

    DEVICE_MEMBER Resident(const ResidentParams &p) : p(p) {
        rank = cluster_rank();
        blocks = cluster_size();
        share = TOKENS / blocks;
        slices = (p.gradient.d_in + SLICE - 1) / SLICE;
        first_part = rank * PARTS / blocks;
        first_slice = part_start(slices, first_part);
        own_slices = part_start(slices, first_part + PARTS / blocks) - first_slice;
        group = thread_index() / GROUP_THREADS;
        thread = thread_index() % GROUP_THREADS;
        warp = thread / 32;
        lane = thread % 32;
        weights = shared_memory();
        hidden = weights + p.slices * SLICE_BYTES + BEHIND;
        parts = reinterpret_cast<float *>(hidden + p.stages * GROUPS * GROUP_BYTES);
        coefs = parts + PARTS * share * LATENTS;
        have_parts = reinterpret_cast<uint64_t *>(coefs + TOKENS * LATENTS);
        have_coefs = have_parts + 1;
        have_rows = have_parts + 2;
    }

    // Starts the copies of all packed rows.
    DEVICE_MEMBER void load_weights() const {
        if (thread_index() == 0) {
            barrier_init(have_parts, GROUPS);
            barrier_init(have_coefs, GROUPS);
            for (uint32_t s = 0; s < own_slices; s++) barrier_init(have_rows + s, 1);
            barriers_are_set();
        }
        // From here on the others may write to this block.
        sync_cluster();
        if (thread_index() != 0) return;
        const unsigned char *from = p.gradient.packed + (uint64_t)first_slice * SLICE_BYTES;
        for (uint32_t s = 0; s < own_slices; s++) {
            const bool last = s + 1 == own_slices;
            const uint32_t at = s * SLICE_BYTES;
            barrier_expect(have_rows + s, SLICE_BYTES + (last ? BEHIND : 0));
            copy_bulk(weights + at, from + at, SLICE_BYTES, have_rows + s);
            if (last) copy_bulk(weights + at + SLICE_BYTES, from, BEHIND, have_rows + s);
        }
    }

    // Announces this group's half of what a tile brings. Both groups do when all their threads are
    // through with the tile before: nobody then waits for a phase while the one after it ends.
    DEVICE_MEMBER void expect() const {
        if (thread != 0) return;
        barrier_expect(have_parts, PARTS * share * LATENTS * 4 / GROUPS);
        barrier_expect(have_coefs, TOKENS * LATENTS * 4 / GROUPS);
    }

    // This group's place in a stage.
    DEVICE_MEMBER unsigned char *stage(uint32_t n) const {
        return hidden + (n * GROUPS + group) * GROUP_BYTES;
    }

    // To the block that adds up these tokens: what a part has come to.
    DEVICE_MEMBER void send(const float (&part)[TILES_N][4], uint32_t index) const {
        const uint32_t first = group * GROUP_TOKENS + warp * 16, g = lane / 4, q = lane % 4;
        float *to = parts + (index * share + first % share + g) * LATENTS + 2 * q;
        UNROLL
        for (int n = 0; n < TILES_N; n++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const FloatPair pair = {part[n][2 * half], part[n][2 * half + 1]};
                store_in_block(to + 8 * half * LATENTS + 8 * n, pair, have_parts, first / share);
            }
        }
    }

    // The products of one slice of 64 tokens.
    DEVICE_MEMBER void multiply(float (&c)[TILES_N][4], const unsigned char *rows,
                                uint32_t slice) const {
        uint32_t a[H::TERMS][4][4];
        load_rows<H>(a, rows + warp * 16 * HIDDEN_ROW<H>);
        const uint64_t b = rows_in_shared(weights + slice * SLICE_BYTES);
        products_begin(c, a);
        in_order<ENCODE_LEVEL, H::TERMS, WEIGHT_TERMS, 4>([&](int i, int j, int step) {
            products(c, a[i][step], step_on(b, j * TERM_BYTES + 32 * step));
        });
        products_end(c);
    }
};

// The copies of one warpgroup's hidden states, slice by slice and tile by tile.
template <typename H>
struct Stream {
    HiddenLoader<H, GROUP_THREADS, GROUP_TOKENS> loader;
    uint64_t tile;
    uint32_t slice, next_live, stage;

    template <typename R>
    DEVICE_MEMBER void begin(const R &r, uint64_t first_tile) {
        tile = first_tile;
        slice = stage = 0;
        loader.first_token = tile * TOKENS + r.group * GROUP_TOKENS;
        loader.live = loader.live_from(loader.first_token);
        next_live = loader.live_from(loader.first_token + r.p.clusters * (uint64_t)TOKENS);
    }

    // The next slice, if there is one; a group of copies in any case.
    template <typename R>
    DEVICE_MEMBER void advance(const R &r) {
        if (tile < r.p.tiles && slice < r.own_slices) {
            loader.load(r.stage(stage), r.first_slice + slice);
            if (++slice == r.own_slices) {
                const uint64_t tokens = r.p.clusters * (uint64_t)TOKENS;
                slice = 0;
                tile += r.p.clusters;
                loader.first_token += tokens;
                loader.live = next_live;
                // Long before it is needed.
                next_live = loader.live_from(loader.first_token + tokens);
            }
        }
        copy_commit();
        stage = stage + 1 == r.p.stages ? 0 : stage + 1;
    }
};

// Two latents of a token of every tile, in the block that adds up its parts.
struct Pair {
    // Among the block's tokens, and the first latent; what belongs to the latents.
    uint32_t token, k;
    bool is_there;
    Latent latents[2];
    float sign_weight[2];
    // Of the token in this tile: it counts if its mask is not zero.
    uint64_t t;
    float mask, scale, reference[2];

    template <int LATENTS>
    DEVICE_MEMBER void begin(const RowsParams &rows, uint32_t share, int n) {
        const uint32_t i = n * THREADS + thread_index();
        token = i / (LATENTS / 2);
        k = i % (LATENTS / 2) * 2;
        is_there = token < share;
        UNROLL
        for (int x = 0; x < 2; x++) {
            latents[x] = {};
            sign_weight[x] = 0.0f;
            if (!is_there || k + x >= rows.count) continue;
            latents[x].load(rows, k + x);
            sign_weight[x] = rows.sign_weight ? rows.sign_weight[k + x] : 0.0f;
        }
    }

    // Reads what the sums will meet.
    DEVICE_MEMBER void load(const EncodeParams &p, uint64_t first_token) {
        t = first_token + token;
        mask = is_there && t < p.tokens ? mask_of(p.mask, t) : 0.0f;
        const bool counts = mask != 0.0f;
        scale = counts ? scale_of(p, t) : 0.0f;
        UNROLL
        for (int x = 0; x < 2; x++) {
            const bool read = counts && p.reference && k + x < p.rows.count;
            reference[x] = read ? p.reference[t * p.reference_stride + k + x] : 0.0f;
        }
    }
};

template <typename H, typename Out, int LATENTS>
DEVICE void resident(const ResidentParams &p) {
    using R = Resident<H, Out, LATENTS>;
    const R r(p);
    const EncodeParams &e = p.encode;
    const uint32_t cluster = block_index() / r.blocks;
    // What belongs to the plan comes while the kernel before this one ends.
    r.load_weights();
    Pair own[OWN];
    UNROLL
    for (int n = 0; n < OWN; n++) own[n].template begin<LATENTS>(e.rows, r.share, n);
    wait_for_the_one_before();

    const bool has_hidden = e.hidden.data;
    Stream<H> stream = {{e, r.thread, 0, 0}, 0, 0, 0, 0};
    stream.begin(r, cluster);
    uint32_t use = 0, phase = 0;
    if (has_hidden) {
        for (uint32_t i = 0; i + 1 < p.stages; i++) stream.advance(r);
    }
    double losses[OWN][2] = {}, count[OWN] = {};
    const double given = p.gradient.scale_tensor ? (double)*p.gradient.scale_tensor : 1.0;
    const float factor = (float)mul_rn(p.gradient.scale, given);

    NO_UNROLL
    for (uint64_t tile = cluster; tile < p.tiles; tile += p.clusters) {
        const uint64_t first_token = tile * TOKENS, own_token = first_token + r.rank * r.share;
        const uint64_t group_token = first_token + r.group * GROUP_TOKENS;
        if (has_hidden) {
            UNROLL
            for (int n = 0; n < OWN; n++) own[n].load(e, own_token);
            const uint64_t t = group_token + r.thread % GROUP_TOKENS;
            // Where no token counts there is nothing to multiply.
            const bool any = any_in_group(r.group, t < e.tokens && mask_of(e.mask, t) != 0.0f);
            r.expect();
            float part[R::TILES_N][4] = {};
            uint32_t now = r.first_part;
            NO_UNROLL
            for (uint32_t s = 0; s < r.own_slices; s++) {
                copy_wait_all_but(p.stages - 2);
                // The group's copies have arrived, and it is done with the stage to fill.
                sync_group(r.group);
                stream.advance(r);
                while (part_start(r.slices, now + 1) <= r.first_slice + s) {
                    r.send(part, now++);
                    clear(part);
                }
                if (any) {
                    barrier_wait(r.have_rows + s, 0);
                    float c[R::TILES_N][4] = {};
                    r.multiply(c, r.stage(use), s);
                    add(part, c);
                }
                use = use + 1 == p.stages ? 0 : use + 1;
            }
            for (; now < r.first_part + PARTS / r.blocks; now++) {
                r.send(part, now);
                clear(part);
            }
            barrier_wait_for_stores(r.have_parts, phase);
            UNROLL
            for (int n = 0; n < OWN; n++) {
                const Pair &x = own[n];
                if (!x.is_there) continue;
                FloatPair coef = {0.0f, 0.0f};
                if (x.t < e.tokens) {
                    float dots[2] = {0.0f, 0.0f}, coefs[2] = {0.0f, 0.0f};
                    UNROLL
                    for (uint32_t part = 0; part < PARTS; part++) {
                        const float *sums = r.parts + (part * r.share + x.token) * LATENTS + x.k;
                        const FloatPair pair = *reinterpret_cast<const FloatPair *>(sums);
                        dots[0] = add_rn(dots[0], pair.low);
                        dots[1] = add_rn(dots[1], pair.high);
                    }
                    const bool counts = x.mask != 0.0f;
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        const uint32_t k = x.k + i;
                        if (k >= e.rows.count) continue;
                        const float dot = mul_rn(dots[i], x.scale);
                        if (e.latents) {
                            // A token that does not count has no threshold.
                            const float z = counts ? latent_of(e, x.latents[i], x.t, dot) : 0.0f;
                            e.latents[x.t * e.latents_stride + k] = z;
                            continue;
                        }
                        if (counts) {
                            if (e.dots) e.dots[x.t * e.dots_stride + k] = dot;
                            const Share share = penalty_of(e, x.latents[i], x.sign_weight[i], x.t,
                                                           dot, x.reference[i], x.mask);
                            coefs[i] = share.coef;
                            losses[n][i] = add_rn(losses[n][i], share.loss);
                        }
                        if (e.coef) e.coef[x.t * e.coef_stride + k] = coefs[i];
                    }
                    coef = {coefs[0], coefs[1]};
                    if (x.k == 0) count[n] = add_rn(count[n], (double)x.mask);
                }
                // Also where nobody needs them: they say that the sums have been read.
                float *at = r.coefs + (r.rank * r.share + x.token) * LATENTS + x.k;
                for (uint32_t to = 0; to < r.blocks; to++) {
                    store_in_block(at, coef, r.have_coefs, to);
                }
            }
            barrier_wait_for_stores(r.have_coefs, phase);
            phase ^= 1;
        }
        if (!p.gradient.grad) continue;

        Coefs<1> coefs;
        if (has_hidden) {
            const float *row = r.coefs + (r.group * GROUP_TOKENS + r.warp * 16 + r.lane / 4) * LATENTS;
            UNROLL
            for (int half = 0; half < 2; half++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    FloatPair pair = {0.0f, 0.0f};
                    if (j < R::TILES_N) {
                        pair = *reinterpret_cast<const FloatPair *>(row + 8 * half * LATENTS +
                                                                    8 * j + r.lane % 4 * 2);
                    }
                    coefs.x[0][half][j] = pair;
                }
            }
        } else {
            coefs.load(p.gradient, group_token + r.warp * 16 + r.lane / 4, 0);
        }
        uint32_t active = coefs.active();
        const bool any = any_in_group(r.group, active != 0);
        // The four lanes of a row have its latents between them.
        active |= shuffle_xor(active, 1);
        active |= shuffle_xor(active, 2);
        if (!any && p.gradient.accumulate) continue;
        uint32_t a[1][Out::TERMS][2][4];
        split_all<Out, 1>(a, coefs, factor);
        NO_UNROLL
        for (uint32_t s = 0; s < r.own_slices; s++) {
            Tiles<1> sums = {};
            if (any) {
                // Products read on into what follows a term's rows.
                barrier_wait(r.have_rows + s, 0);
                barrier_wait(r.have_rows + (s + 1 < r.own_slices ? s + 1 : s), 0);
                const uint64_t b = rows_in_shared(r.weights + s * R::SLICE_BYTES);
                products_begin(sums[0], a[0]);
                in_order<Out::LEVEL, Out::TERMS, Out::TERMS, R::STEPS>(
                    [&](int i, int j, int step) {
                        products_transposed(sums[0], a[0][i][step],
                                            step_on(b, j * R::TERM_BYTES + 16 * step * ROW_BYTES));
                    });
                products_end(sums[0]);
            }
            const Place place = {group_token + r.warp * 16 + r.lane / 4,
                                 (r.first_slice + s) * SLICE + r.lane % 4 * 8};
            write_rows<Out, 1>(p.gradient, sums, place, active);
        }
    }

    // Nobody sends to this block any more. What it copies itself must have come before it ends.
    if (thread_index() == 0) {
        for (uint32_t s = 0; s < r.own_slices; s++) barrier_wait(r.have_rows + s, 0);
    }
    if (!e.loss_partials) return;
    // In the place of the last sums: since all coefficients have come, all threads have read these.
    double *of_tokens = reinterpret_cast<double *>(r.parts);
    double *counts = of_tokens + r.share * LATENTS;
    UNROLL
    for (int n = 0; n < OWN; n++) {
        const Pair &x = own[n];
        if (!x.is_there) continue;
        of_tokens[x.token * LATENTS + x.k] = losses[n][0];
        of_tokens[x.token * LATENTS + x.k + 1] = losses[n][1];
        if (x.k == 0) counts[x.token] = count[n];
    }
    sync_block();
    const uint32_t k = thread_index();
    if (k > e.rows.count || (k == e.rows.count && !e.mask.data)) return;
    const bool is_count = k == e.rows.count;
    double sum = 0.0;
    for (uint32_t token = 0; token < r.share; token++) {
        sum = add_rn(sum, is_count ? counts[token] : of_tokens[token * LATENTS + k]);
    }
    if (is_count) e.count_partials[block_index()] = sum;
    else e.loss_partials[block_index() * (uint64_t)e.rows.padded_count + k] = sum;
}

} // namespace

#define RESIDENT(name, H, Out, latents)                                                            \
    SM90_KERNEL(name, ResidentParams, THREADS, resident<H, Out, latents>)

RESIDENT(blockem_resident_f32_8, F32, ToF32, 8)
RESIDENT(blockem_resident_f32_16, F32, ToF32, 16)
RESIDENT(blockem_resident_f32_24, F32, ToF32, 24)
RESIDENT(blockem_resident_f32_32, F32, ToF32, 32)
RESIDENT(blockem_resident_f16_8, F16, ToF16, 8)
RESIDENT(blockem_resident_f16_16, F16, ToF16, 16)
RESIDENT(blockem_resident_f16_24, F16, ToF16, 24)
RESIDENT(blockem_resident_f16_32, F16, ToF16, 32)
RESIDENT(blockem_resident_bf16_8, Bf16, ToBf16, 8)
RESIDENT(blockem_resident_bf16_16, Bf16, ToBf16, 16)
RESIDENT(blockem_resident_bf16_24, Bf16, ToBf16, 24)
RESIDENT(blockem_resident_bf16_32, Bf16, ToBf16, 32)
