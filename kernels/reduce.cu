// The second stage of the loss: from tiles to latents, from latents to one number.
//
//   latent_loss[k] = Σ_tile partial[tile, k],   loss_sum = Σ_k latent_loss[k]
//   token_count = Σ_tile count[tile], or T without a mask
//
// Parallelisation: a CTA sums 32 latents, eight threads for each; one CTA sums the latents. With up
// to 32 latents that is the same CTA, and the second launch is not made.
// Bytes moved: 8 · K · T / 64 (or / 128) read.
// Determinism: all sums are in f64, in an order that only the number of tiles and latents decides.
#include "device.cuh"
#include "params.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int LATENTS = 32;
constexpr int SHARES = THREADS / LATENTS;

DEVICE void write(const OutputParams &out, uint64_t i, double value) {
    if (!out.data) return;
    if (out.is_f64) reinterpret_cast<double *>(out.data)[i * out.stride] = value;
    else reinterpret_cast<float *>(out.data)[i * out.stride] = (float)value;
}

// Every `step`th of n numbers from `first` on, in order; eight reads are under way at a time.
DEVICE double sum_of(const double *x, uint64_t n, uint64_t first, uint64_t step) {
    double sum = 0.0;
    for (uint64_t i = first; i < n; i += 8 * step) {
        double ahead[8];
        UNROLL
        for (uint64_t j = 0; j < 8; j++) ahead[j] = i + j * step < n ? x[i + j * step] : 0.0;
        UNROLL
        for (uint64_t j = 0; j < 8; j++) sum = add_rn(sum, ahead[j]);
    }
    return sum;
}

// The threads' sums, then a tree over the block: every thread has the result.
DEVICE double block_sum(const double *x, uint64_t n, double *scratch) {
    double sum = sum_of(x, n, thread_index(), THREADS);
    UNROLL
    for (uint32_t lanes = 1; lanes < 32; lanes *= 2) sum = add_rn(sum, shuffle_xor(sum, lanes));
    if (thread_index() % 32 == 0) scratch[thread_index() / 32] = sum;
    sync_block();
    sum = 0.0;
    UNROLL
    for (int i = 0; i < THREADS / 32; i++) sum = add_rn(sum, scratch[i]);
    sync_block();
    return sum;
}

DEVICE void totals(const ReduceParams &p, double *scratch) {
    const double loss = block_sum(p.latent_sums, p.count, scratch);
    const double count =
        p.count_partials ? block_sum(p.count_partials, p.tiles, scratch) : (double)p.tokens;
    if (thread_index() == 0) {
        write(p.loss_sum, 0, loss);
        write(p.token_count, 0, count);
    }
}

} // namespace

KERNEL(blockem_reduce_latents, ReduceParams, THREADS, 1) {
    double *scratch = reinterpret_cast<double *>(shared_memory());
    const uint32_t own = thread_index() % LATENTS, share = thread_index() / LATENTS;
    const uint32_t k = block_index() * LATENTS + own;
    double sum = 0.0;
    if (k < p.count) {
        const uint64_t all = p.tiles * p.padded_count, row = p.padded_count;
        sum = sum_of(p.loss_partials, all, share * row + k, SHARES * row);
    }
    scratch[thread_index()] = sum;
    sync_block();
    if (share == 0 && k < p.count) {
        sum = 0.0;
        UNROLL
        for (int i = 0; i < SHARES; i++) sum = add_rn(sum, scratch[i * LATENTS + own]);
        p.latent_sums[k] = sum;
        write(p.latent_loss, k, sum);
    }
    if (block_count() > 1) return;
    // The block reads back what it has written.
    sync_block();
    totals(p, scratch);
}

KERNEL(blockem_reduce_total, ReduceParams, THREADS, 1) {
    totals(p, reinterpret_cast<double *>(shared_memory()));
}
