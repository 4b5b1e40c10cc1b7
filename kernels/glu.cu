// What a GLU encoder makes of products: latents, or coefficients and loss; then coefficients of rows.
//
//   v = dot[t, 2k] + bias_k,   g = dot[t, 2k + 1] + glu_bias_k,   u = v · σ(g)
//   blockem_glu_latents: u stands for dot in the formulas of encode.cu, where bias_k is 0
//   blockem_glu_coefficients:
//   out[t, 2k] = coef[t, k] · σ(g),   out[t, 2k + 1] = coef[t, k] · v · σ(g) · σ(−g)
//   A coefficient of zero takes no part, whatever the products are.
//
// Parallelisation: latents by CTAs of 64 tokens × 32 latents, a latent for each lane and eight tokens
// for each warp; coefficients by a warp for each token.
// Bytes moved: products 8 · T · K, reference and coefficients 4 · T · K each; coefficients 4 · T · K
// and of those that are not zero 8 bytes of products read, 8 · T · K written.
// Determinism: a latent depends on its own products alone. Losses are summed in f64 along a fixed
// tree within a tile; reduce.cu adds up the tiles.
#include "glu.cuh"
#include "latent.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / 32;
constexpr uint32_t LATENTS = 32;
constexpr uint32_t TOKENS = 64;

DEVICE Glu glu_of(const float *dots, uint64_t k, const float *bias, const float *glu_bias) {
    return Glu(add_rn(dots[2 * k], bias[k]), add_rn(dots[2 * k + 1], glu_bias[k]));
}

// The latent's loss over one warp's tokens.
DEVICE double latents(const GluLatentsParams &params, uint64_t first_token, uint32_t k) {
    const EncodeParams &p = params.encode;
    Latent own;
    own.load(p.rows, k);
    const float sign_weight = p.rows.sign_weight ? p.rows.sign_weight[k] : 0.0f;
    double loss = 0.0;
    NO_UNROLL
    for (uint64_t t = first_token; t < first_token + TOKENS / WARPS; t++) {
        if (t >= p.tokens) break;
        const float mask = mask_of(p.mask, t);
        float coef = 0.0f;
        if (mask != 0.0f) {
            const float *dots = p.dots + t * p.dots_stride;
            const float dot = glu_of(dots, k, params.bias, params.glu_bias).pre();
            const float pre = add_rn(mul_rn(dot, own.scale), own.bias);
            const bool off = own.off(p, t, dot, pre);
            const float z = off ? 0.0f : pre;
            if (p.latents) {
                p.latents[t * p.latents_stride + k] = z;
                continue;
            }
            const float reference = p.reference[t * p.reference_stride + k];
            const Share share = own.share(z, reference, sign_weight, mask);
            if (!off) coef = share.coef;
            loss = add_rn(loss, share.loss);
        }
        if (p.coef) p.coef[t * p.coef_stride + k] = coef;
        if (p.latents) p.latents[t * p.latents_stride + k] = 0.0f;
    }
    return loss;
}

} // namespace

KERNEL(blockem_glu_latents, GluLatentsParams, THREADS, 1) {
    const EncodeParams &e = p.encode;
    double *scratch = reinterpret_cast<double *>(shared_memory());
    const uint32_t latent_tiles = (e.rows.count + LATENTS - 1) / LATENTS;
    const uint64_t tile = block_index() / latent_tiles;
    const uint64_t first_token = tile * TOKENS;
    const uint32_t first_latent = block_index() % latent_tiles * LATENTS;
    const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
    const uint32_t k = first_latent + lane;
    double loss = 0.0;
    if (k < e.rows.count) loss = latents(p, first_token + warp * (TOKENS / WARPS), k);
    if (!e.loss_partials) return;
    if (e.mask.data && first_latent == 0 && warp == 0) write_count<TOKENS>(e, first_token, tile);
    scratch[thread_index()] = loss;
    sync_block();
    if (warp != 0 || k >= e.rows.count) return;
    loss = 0.0;
    UNROLL
    for (uint32_t i = 0; i < WARPS; i++) loss = add_rn(loss, scratch[i * LATENTS + lane]);
    e.loss_partials[tile * e.rows.padded_count + k] = loss;
}

KERNEL(blockem_glu_coefficients, GluParams, THREADS, 1) {
    const uint64_t t = (uint64_t)block_index() * WARPS + thread_index() / 32;
    if (t >= p.tokens) return;
    for (uint64_t k = thread_index() % 32; k < p.count; k += 32) {
        const float coef = p.coef[t * p.coef_stride + k];
        FloatPair out = {0.0f, 0.0f};
        if (coef != 0.0f) {
            const float *dots = p.dots + t * p.dots_stride;
            out = glu_of(dots, k, p.bias, p.glu_bias).coefs(coef);
        }
        float *to = p.out + t * p.out_stride + 2 * k;
        to[0] = out.low;
        to[1] = out.high;
    }
}
