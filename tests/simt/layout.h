// Sizes and offsets of the parameter structs, in the words of src/backend/cuda/launch.rs.
#pragma once

#include <stddef.h>
#include <stdio.h>

#include "params.cuh"

#define STRUCT(name) printf("%s %zu\n", #name, sizeof(name))
#define FIELD(name, field) printf("%s.%s %zu\n", #name, #field, offsetof(name, field))

inline void print_layout() {
    STRUCT(RowsParams);
    FIELD(RowsParams, packed);
    FIELD(RowsParams, bias);
    FIELD(RowsParams, scale);
    FIELD(RowsParams, gate_values);
    FIELD(RowsParams, sign_weight);
    FIELD(RowsParams, group);
    FIELD(RowsParams, groups);
    FIELD(RowsParams, by_magnitude);
    FIELD(RowsParams, count);
    FIELD(RowsParams, padded_count);
    FIELD(RowsParams, d_in);
    FIELD(RowsParams, gate);
    STRUCT(HiddenParams);
    FIELD(HiddenParams, data);
    FIELD(HiddenParams, stride);
    FIELD(HiddenParams, dtype);
    FIELD(HiddenParams, is_aligned);
    STRUCT(MaskParams);
    FIELD(MaskParams, data);
    FIELD(MaskParams, stride);
    FIELD(MaskParams, is_f32);
    STRUCT(PackParams);
    FIELD(PackParams, weight);
    FIELD(PackParams, weight_stride);
    FIELD(PackParams, packed);
    FIELD(PackParams, count);
    FIELD(PackParams, padded_count);
    FIELD(PackParams, d_in);
    FIELD(PackParams, slices);
    STRUCT(EncodeParams);
    FIELD(EncodeParams, rows);
    FIELD(EncodeParams, hidden);
    FIELD(EncodeParams, mask);
    FIELD(EncodeParams, token_scales);
    FIELD(EncodeParams, thresholds);
    FIELD(EncodeParams, latents);
    FIELD(EncodeParams, latents_stride);
    FIELD(EncodeParams, reference);
    FIELD(EncodeParams, reference_stride);
    FIELD(EncodeParams, coef);
    FIELD(EncodeParams, coef_stride);
    FIELD(EncodeParams, dots);
    FIELD(EncodeParams, dots_stride);
    FIELD(EncodeParams, loss_partials);
    FIELD(EncodeParams, count_partials);
    FIELD(EncodeParams, tokens);
    STRUCT(TopKParams);
    FIELD(TopKParams, pre);
    FIELD(TopKParams, pre_stride);
    FIELD(TopKParams, largest);
    FIELD(TopKParams, floors);
    FIELD(TopKParams, thresholds);
    FIELD(TopKParams, mask);
    FIELD(TopKParams, first);
    FIELD(TopKParams, count);
    FIELD(TopKParams, k);
    FIELD(TopKParams, groups);
    FIELD(TopKParams, group_size);
    FIELD(TopKParams, by_magnitude);
    STRUCT(NormParams);
    FIELD(NormParams, hidden);
    FIELD(NormParams, mask);
    FIELD(NormParams, coef);
    FIELD(NormParams, coef_stride);
    FIELD(NormParams, scales);
    FIELD(NormParams, means);
    FIELD(NormParams, slopes);
    FIELD(NormParams, live);
    FIELD(NormParams, tokens);
    FIELD(NormParams, is_layer);
    FIELD(NormParams, d_in);
    FIELD(NormParams, count);
    STRUCT(PullParams);
    FIELD(PullParams, coef);
    FIELD(PullParams, coef_stride);
    FIELD(PullParams, dots);
    FIELD(PullParams, dots_stride);
    FIELD(PullParams, scales);
    FIELD(PullParams, means);
    FIELD(PullParams, slopes);
    FIELD(PullParams, pulls);
    FIELD(PullParams, scale_tensor);
    FIELD(PullParams, scale);
    FIELD(PullParams, tokens);
    FIELD(PullParams, count);
    STRUCT(GradientParams);
    FIELD(GradientParams, packed);
    FIELD(GradientParams, coef);
    FIELD(GradientParams, coef_stride);
    FIELD(GradientParams, grad);
    FIELD(GradientParams, grad_stride);
    FIELD(GradientParams, scale_tensor);
    FIELD(GradientParams, scale);
    FIELD(GradientParams, pulls);
    FIELD(GradientParams, hidden);
    FIELD(GradientParams, tokens);
    FIELD(GradientParams, count);
    FIELD(GradientParams, padded_count);
    FIELD(GradientParams, d_in);
    FIELD(GradientParams, tiles_per_cta);
    FIELD(GradientParams, column_tiles);
    FIELD(GradientParams, accumulate);
    FIELD(GradientParams, coef_is_aligned);
    FIELD(GradientParams, grad_is_aligned);
    STRUCT(OutputParams);
    FIELD(OutputParams, data);
    FIELD(OutputParams, stride);
    FIELD(OutputParams, is_f64);
    STRUCT(ReduceParams);
    FIELD(ReduceParams, loss_partials);
    FIELD(ReduceParams, count_partials);
    FIELD(ReduceParams, latent_sums);
    FIELD(ReduceParams, tiles);
    FIELD(ReduceParams, tokens);
    FIELD(ReduceParams, loss_sum);
    FIELD(ReduceParams, token_count);
    FIELD(ReduceParams, latent_loss);
    FIELD(ReduceParams, count);
    FIELD(ReduceParams, padded_count);
}
