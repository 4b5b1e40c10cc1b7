// Sums over tokens for a part of a dictionary's latents.
//
//   sum[k] += m_t z[t, k],   square_sum[k] += m_t z[t, k]^2,   active[k] += m_t where z[t, k] is not 0,
//   max[k] = the largest z[t, k] so far (NaN stays), the same of the base model's z,
//   rise[k] += m_t relu(z - base)^2,   fall[k] += m_t relu(base - z)^2,   token_count += m_t
//
// Parallelisation: a thread takes one latent through the tokens, sixteen of which it reads ahead; the
// threads of a warp read 32 adjacent latents of a token at once.
// Bytes moved: 4 T K read of either model, 16 K bytes of sums for each row of them.
// Determinism: each sum is one chain in f64, in the order of the tokens, that goes on from what is
// there: so it does not depend on how the tokens are cut into calls.
#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr uint32_t THREADS = 64;
constexpr uint32_t AHEAD = 16;

// Sums of one latent over one model's tokens: four rows of the state.
struct Sums {
    double sum, square_sum, active, max;

    DEVICE_MEMBER void load(const double *at, uint64_t stride, bool there) {
        sum = there ? at[0] : 0.0;
        square_sum = there ? at[stride] : 0.0;
        active = there ? at[2 * stride] : 0.0;
        max = there ? at[3 * stride] : -HUGE_VAL;
    }

    DEVICE_MEMBER void store(double *at, uint64_t stride) const {
        at[0] = sum;
        at[stride] = square_sum;
        at[2 * stride] = active;
        at[3 * stride] = max;
    }

    DEVICE_MEMBER void add(double share, float latent) {
        const double z = latent;
        sum = add_rn(sum, mul_rn(share, z));
        square_sum = add_rn(square_sum, mul_rn(share, mul_rn(z, z)));
        if (latent != 0.0f) active = add_rn(active, share);
        if (!(z <= max || max != max)) max = z;
    }
};

// relu of a difference in f32, squared in f64, as the penalty has it.
DEVICE double square_of_rise(float above, float below) {
    const float rise = add_rn(above, -below);
    const double r = rise <= 0.0f ? 0.0f : rise;
    return mul_rn(r, r);
}

} // namespace

KERNEL(blockem_stats, StatsParams, THREADS, 1) {
    const uint32_t k = block_index() * THREADS + thread_index();
    if (k >= p.count) return;
    double *state = p.state + k;
    Sums own, base;
    own.load(state, p.state_stride, p.accumulate);
    double rise = 0.0, fall = 0.0;
    const bool counts = k == 0 && p.token_count;
    double count = counts && p.accumulate ? *p.token_count : 0.0;
    if (p.base) {
        base.load(state + 4 * p.state_stride, p.state_stride, p.accumulate);
        rise = p.accumulate ? state[8 * p.state_stride] : 0.0;
        fall = p.accumulate ? state[9 * p.state_stride] : 0.0;
    }
    for (uint64_t start = 0; start < p.tokens; start += AHEAD) {
        float share[AHEAD], z[AHEAD], before[AHEAD];
        UNROLL
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint64_t t = start + i;
            share[i] = t < p.tokens ? mask_of(p.mask, t) : 0.0f;
            z[i] = t < p.tokens ? p.latents[t * p.stride + k] : 0.0f;
            before[i] = t < p.tokens && p.base ? p.base[t * p.stride + k] : 0.0f;
        }
        UNROLL
        for (uint32_t i = 0; i < AHEAD; i++) {
            if (share[i] == 0.0f) continue;
            if (counts) count = add_rn(count, (double)share[i]);
            own.add(share[i], z[i]);
            if (!p.base) continue;
            base.add(share[i], before[i]);
            rise = add_rn(rise, mul_rn((double)share[i], square_of_rise(z[i], before[i])));
            fall = add_rn(fall, mul_rn((double)share[i], square_of_rise(before[i], z[i])));
        }
    }
    own.store(state, p.state_stride);
    if (counts) *p.token_count = count;
    if (!p.base) return;
    base.store(state + 4 * p.state_stride, p.state_stride);
    state[8 * p.state_stride] = rise;
    state[9 * p.state_stride] = fall;
}
