// The kernels' parameters, one struct each, passed by value. src/backend/cuda/launch.rs has the
// same structs; a test compares every size and offset.
#pragma once

#include <stdint.h>

enum Gate : uint32_t { GATE_OPEN, GATE_RELU, GATE_THRESHOLD, GATE_GATED };

// Encoder rows on the device; null where absent.
struct RowsParams {
    const unsigned char *packed;
    const float *bias;
    const float *scale;
    const float *gate_values;
    const float *sign_weight;
    uint32_t count;
    uint32_t padded_count;
    uint32_t d_in;
    uint32_t gate;
};

struct PackParams {
    const float *weight;
    uint64_t weight_stride;
    unsigned char *packed;
    uint32_t count;
    uint32_t padded_count;
    uint32_t d_in;
    uint32_t slices;
};

// With latents: z and nothing else. Without: coefficients and loss.
struct EncodeParams {
    RowsParams rows;
    const unsigned char *hidden;
    uint64_t hidden_stride;
    float *latents;
    uint64_t latents_stride;
    const float *reference;
    uint64_t reference_stride;
    const unsigned char *mask;
    uint64_t mask_stride;
    float *coef;
    uint64_t coef_stride;
    double *loss_partials;
    double *count_partials;
    uint64_t tokens;
    uint32_t mask_is_f32;
    uint32_t hidden_is_aligned;
};

struct GradientParams {
    const unsigned char *packed;
    const float *coef;
    uint64_t coef_stride;
    unsigned char *grad;
    uint64_t grad_stride;
    const float *scale_tensor;
    double scale;
    uint64_t tokens;
    uint32_t count;
    uint32_t padded_count;
    uint32_t d_in;
    uint32_t tiles_per_cta;
    uint32_t column_tiles;
    uint32_t accumulate;
    uint32_t coef_is_aligned;
    uint32_t grad_is_aligned;
};

// f32 or f64, with stride elements from one to the next; null if absent.
struct OutputParams {
    unsigned char *data;
    uint64_t stride;
    uint64_t is_f64;
};

struct ReduceParams {
    const double *loss_partials;
    const double *count_partials;
    double *latent_sums;
    uint64_t tiles;
    uint64_t tokens;
    OutputParams loss_sum;
    OutputParams token_count;
    OutputParams latent_loss;
    uint32_t count;
    uint32_t padded_count;
};
