// What normalises every token, and what that adds to dH.
//
//   constant: a = √(d / Σ h²), mean = 0, q = 1 / Σ h²
//   layer:    mean = Σ h / d, σ = √(Σ (h − mean)² / (d − 1)), a = 1 / (σ + 1e-5),
//             q = a / ((d − 1) σ)
//   dot[t, k] = a · (W[k, :] · h[t, :]),   d(dot)/dh = a W − q dot (h − mean)
//   pull[t] = factor · q · Σ_k coef[t, k] · dot[t, k],   and coef[t, k] · a for gradient.cu
//   norm[t] = √(Σ h²)                                    of blockem_token_norms
//
// Parallelisation: a warp for each token, eight adjacent columns for each lane at a time.
// Bytes moved: blockem_norm h once (layer: twice, the second time cached), blockem_token_norms h
// once; blockem_pull reads the coefficients and the products, 8 · T · K, and writes 4 · T · K. Of
// tokens that the mask leaves out, or that have no coefficient where these are given, h is not read.
// Determinism: sums are in f64, along a tree that only d or K decides.
#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr uint32_t THREADS = 256;
// What SAELens adds to a token's standard deviation before it divides by it.
constexpr double LAYER_NORM_EPS = 1e-5;

DEVICE uint64_t own_token() {
    return (uint64_t)block_index() * (THREADS / 32) + thread_index() / 32;
}

// Every lane has the result.
DEVICE double warp_sum(double x) {
    UNROLL
    for (uint32_t lanes = 1; lanes < 32; lanes *= 2) x = add_rn(x, shuffle_xor(x, lanes));
    return x;
}

// Σ h, or Σ (h − mean)². Parameters have hidden and d_in.
template <bool SQUARES, typename P>
DEVICE double sum_of(const P &p, uint64_t t, double mean) {
    double sums[8] = {};
    for (uint32_t column = thread_index() % 32 * 8; column < p.d_in; column += 32 * 8) {
        Row8 x;
        load_hidden(x, p.hidden, p.hidden.dtype, t, column, p.d_in);
        UNROLL
        for (uint32_t i = 0; i < 8; i++) {
            if (column + i >= p.d_in) continue;
            const double h = add_rn((double)x.v[i], -mean);
            sums[i] = add_rn(sums[i], SQUARES ? mul_rn(h, h) : h);
        }
    }
    double sum = 0.0;
    UNROLL
    for (int i = 0; i < 8; i++) sum = add_rn(sum, sums[i]);
    return warp_sum(sum);
}

DEVICE void normalise(const NormParams &p, uint64_t t, double &scale, double &mean, double &slope) {
    const double d = p.d_in;
    mean = p.norm == NORM_LAYER ? sum_of<false>(p, t, 0.0) / d : 0.0;
    const double squares = sum_of<true>(p, t, mean);
    if (p.norm == NORM_LAYER) {
        const double deviation = sqrt(squares / (d - 1.0));
        scale = 1.0 / add_rn(deviation, LAYER_NORM_EPS);
        slope = scale / mul_rn(d - 1.0, deviation);
    } else {
        scale = sqrt(d / squares);
        slope = 1.0 / squares;
    }
}

DEVICE bool has_coefficient(const NormParams &p, uint64_t t) {
    bool any = false;
    for (uint32_t k = thread_index() % 32; k < p.count; k += 32) {
        any |= p.coef[t * p.coef_stride + k] != 0.0f;
    }
    return any_in_warp(any);
}

} // namespace

KERNEL(blockem_norm, NormParams, THREADS, 1) {
    const uint64_t t = own_token();
    if (t >= p.tokens) return;
    const bool live = mask_of(p.mask, t) != 0.0f && (!p.coef || has_coefficient(p, t));
    const bool normed = p.norm != NORM_NONE;
    double scale = 0.0, mean = 0.0, slope = 0.0;
    if (live && normed) normalise(p, t, scale, mean, slope);
    if (thread_index() % 32 != 0) return;
    if (p.live) p.live[t] = live ? 1.0f : 0.0f;
    if (!normed) return;
    p.scales[t] = (float)scale;
    p.means[t] = (float)mean;
    p.slopes[t] = slope;
}

KERNEL(blockem_pull, PullParams, THREADS, 1) {
    const uint64_t t = own_token();
    if (t >= p.tokens) return;
    const float *coef = p.coef + t * p.coef_stride;
    float *dots = p.dots + t * p.dots_stride;
    const float scale = p.scales[t];
    double sum = 0.0;
    for (uint64_t k = thread_index() % 32; k < p.count; k += 32) {
        // One that takes no part adds nothing, whatever its product.
        float scaled = 0.0f;
        if (coef[k] != 0.0f) {
            sum = add_rn(sum, mul_rn((double)coef[k], (double)dots[k]));
            scaled = mul_rn(scale, coef[k]);
        }
        dots[k] = scaled;
    }
    sum = warp_sum(sum);
    if (thread_index() % 32 != 0) return;
    const double given = p.scale_tensor ? (double)*p.scale_tensor : 1.0;
    const double factor = (float)mul_rn(p.scale, given);
    FloatPair pair = {0.0f, p.means[t]};
    if (sum != 0.0) pair.low = (float)mul_rn(factor, mul_rn(p.slopes[t], sum));
    reinterpret_cast<FloatPair *>(p.pulls)[t] = pair;
}

KERNEL(blockem_token_norms, TokenNormsParams, THREADS, 1) {
    const uint64_t t = own_token();
    if (t >= p.tokens) return;
    const double norm = sqrt(sum_of<true>(p, t, 0.0));
    if (thread_index() % 32 != 0) return;
    const uint64_t at = t * p.norms.stride;
    if (p.norms.is_f64) reinterpret_cast<double *>(p.norms.data)[at] = norm;
    else reinterpret_cast<float *>(p.norms.data)[at] = (float)norm;
}
