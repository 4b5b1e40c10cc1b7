// The kernels' parameters, one struct each, passed by value. src/backend/cuda/launch/ has the
// same structs; a test compares every size and offset.
#pragma once

#include <stdint.h>

enum Gate : uint32_t { GATE_OPEN, GATE_RELU, GATE_THRESHOLD, GATE_GATED, GATE_TOPK };
enum Norm : uint32_t { NORM_NONE, NORM_CONSTANT, NORM_LAYER };
enum Dtype : uint32_t { DTYPE_F32, DTYPE_F16, DTYPE_BF16 };

// Encoder rows on the device; null where absent.
struct RowsParams {
    const unsigned char *packed;
    const float *bias;
    const float *scale;
    const float *gate_values;
    const float *sign_weight;
    // Of a topk gate: each latent's group, and how many there are.
    const uint32_t *group;
    uint32_t groups;
    uint32_t by_magnitude;
    uint32_t count;
    uint32_t padded_count;
    uint32_t d_in;
    uint32_t gate;
};

// [T, d], or null where there is nothing to read.
struct HiddenParams {
    const unsigned char *data;
    uint64_t stride;
    uint32_t dtype;
    // Every row starts at sixteen bytes.
    uint32_t is_aligned;
};

// One number for each token; null: all count once.
struct MaskParams {
    const unsigned char *data;
    uint64_t stride;
    uint64_t is_f32;
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

// With latents: z and nothing else. Without: coefficients and loss, and products where a norm needs
// them.
struct EncodeParams {
    RowsParams rows;
    HiddenParams hidden;
    MaskParams mask;
    // What every product of a token is multiplied by, or null: 1.
    const float *token_scales;
    // [T, groups] of a topk gate.
    const float *thresholds;
    float *latents;
    uint64_t latents_stride;
    const float *reference;
    uint64_t reference_stride;
    float *coef;
    uint64_t coef_stride;
    float *dots;
    uint64_t dots_stride;
    double *loss_partials;
    double *count_partials;
    uint64_t tokens;
};

// One part of the rivals of a topk gate, for one block of tokens.
struct TopKParams {
    const float *pre;
    uint64_t pre_stride;
    // Per token, from part to part: the k largest so far, and the least of them.
    uint32_t *largest;
    uint32_t *floors;
    float *thresholds;
    MaskParams mask;
    // The part's first rival, and how many follow.
    uint32_t first;
    uint32_t count;
    uint32_t k;
    uint32_t groups;
    uint32_t group_size;
    uint32_t by_magnitude;
};

// With coefficients: only tokens that have one other than zero are live. Without a norm nothing but
// that is written.
struct NormParams {
    HiddenParams hidden;
    MaskParams mask;
    const float *coef;
    uint64_t coef_stride;
    float *scales;
    float *means;
    double *slopes;
    float *live;
    uint64_t tokens;
    uint64_t norm;
    uint32_t d_in;
    uint32_t count;
};

struct PullParams {
    const float *coef;
    uint64_t coef_stride;
    // Products, which become coefficients of the rows themselves.
    float *dots;
    uint64_t dots_stride;
    const float *scales;
    const float *means;
    const double *slopes;
    // Pull and mean of each token.
    float *pulls;
    const float *scale_tensor;
    double scale;
    uint64_t tokens;
    uint64_t count;
};

// Rows have no bias here, hidden states are not read, and `dots` are [T, 2K] products to read.
struct GluLatentsParams {
    EncodeParams encode;
    const float *bias;
    const float *glu_bias;
};

// Coefficients of latents [T, K] and products [T, 2K], then coefficients of rows [T, 2K].
struct GluParams {
    const float *coef;
    uint64_t coef_stride;
    const float *dots;
    uint64_t dots_stride;
    const float *bias;
    const float *glu_bias;
    float *out;
    uint64_t out_stride;
    uint64_t tokens;
    uint64_t count;
};

struct GradientParams {
    const unsigned char *packed;
    const float *coef;
    uint64_t coef_stride;
    unsigned char *grad;
    uint64_t grad_stride;
    const float *scale_tensor;
    double scale;
    // Null without a norm: pull and mean of each token.
    const float *pulls;
    HiddenParams hidden;
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

// Without hidden states the gradient's coefficients are read; without rows of dH none are written.
struct ResidentParams {
    EncodeParams encode;
    GradientParams gradient;
    // Of 128 tokens.
    uint64_t tiles;
    uint32_t clusters;
    uint32_t stages;
    // Of a block, at most.
    uint32_t slices;
    uint32_t padding;
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

// z of a block of tokens for a part of a dictionary, and the sums that it is added to.
struct StatsParams {
    // [tokens, count]; base null for one model.
    const float *latents;
    const float *base;
    uint64_t stride;
    MaskParams mask;
    // The first sum of the part's first latent, and numbers from one row of sums to the next.
    double *state;
    uint64_t state_stride;
    // Null, or where the tokens' shares are added up too.
    double *token_count;
    uint64_t tokens;
    uint32_t count;
    uint32_t accumulate;
};

// Hidden states of a batch [B, S, d], and unit vectors to push them along.
struct SteerParams {
    // [count, stride]; rows begin at sixteen bytes and are zero from d_in on.
    const float *directions;
    uint64_t directions_stride;
    // Positions of the first row of the batch, written too; elements from one row to the next.
    HiddenParams hidden;
    uint64_t hidden_stride;
    // Which direction each row of the batch takes: -1 none.
    const int64_t *row;
    uint64_t row_stride;
    const float *strength;
    uint64_t strength_stride;
    // Of the first row of the batch.
    MaskParams mask;
    uint64_t mask_stride;
    const float *scale_tensor;
    double scale;
    uint64_t batch;
    uint64_t positions;
    uint64_t column_tiles;
    uint32_t count;
    uint32_t d_in;
};

struct TokenNormsParams {
    HiddenParams hidden;
    OutputParams norms;
    uint64_t tokens;
    uint64_t d_in;
};
