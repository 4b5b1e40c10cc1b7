"""include/blockem.h in ctypes: constants, structs in the header's order, function types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_double, c_float, c_int8, c_int32, c_int64
from ctypes import c_size_t, c_uint32, c_uint64, c_void_p

STATUS_OK = 0
STATUS_INVALID_ARGUMENT = 100
STATUS_SHAPE = 103
STATUS_DTYPE = 104
STATUS_LAYOUT = 105
STATUS_DEVICE_MISMATCH = 106
STATUS_LATENT_RANGE = 108
STATUS_UNSUPPORTED = 109
STATUS_IO = 200
STATUS_NON_FINITE = 205
STATUS_CACHE_STALE = 206
STATUS_PROVENANCE_MISMATCH = 208

DTYPES = {
    "float32": 0, "float16": 1, "bfloat16": 2, "float64": 3, "uint8": 4, "bool": 5, "int64": 6,
}
DEVICES = {"cpu": 0, "cuda": 1}
ARCHITECTURES = {"standard": 0, "jumprelu": 1, "gated": 2, "topk": 3}
ENCODER_LAYOUTS = {"auto": 0, "d_f": 1, "f_d": 2}
SELECTIONS = {"largest": 0, "magnitude": 1, "groups": 2, "batch": 3}
SITES = {
    "unknown": 0, "block_input": 1, "block_output": 2, "attention_output": 3, "mlp_output": 4,
    "attention_z": 5, "embedding": 6, "block_middle": 7, "mlp_input": 8, "module_output": 9,
    "attention_input": 10, "keys": 11, "values": 12, "norm_output": 13, "linear_input": 14,
}  # fmt: skip
TOKEN_NORMS = {"none": 0, "constant_norm_rescale": 1, "layer_norm": 2}
BACKENDS = {"auto": 0, "cpu": 1, "cuda": 2, "reference": 3}
PARTS = {"whole": 0, "columns": 1, "gate": 2}
ACTIVATIONS = {"native": 0, "dense_relu": 1, "preactivation": 2}
CACHE_MODES = {"read": 0, "write": 1, "create": 2}
CACHE_KEY_SIZE = 32
STATS_STATE = {
    "sum": 0, "square_sum": 1, "active": 2, "max": 3,
    "base_sum": 4, "base_square_sum": 5, "base_active": 6, "base_max": 7,
    "rise_square_sum": 8, "fall_square_sum": 9,
}
STATS_ROWS = 4
STATS_ROWS_WITH_BASE = 10
CLOSINGS = {"include": 0, "exclude": 1}
OTHER_TURNS = {"auto": 0, "closed": 1, "open": 2}
BORDERS = {"include": 0, "exclude": 1, "refuse": 2}


class Sized(ctypes.Structure):
    """A struct that begins with struct_size; fields that are not given are zero."""

    def __init__(self, **fields: object) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
    ]


class BuildInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("version", c_uint32),
        ("has_cuda", c_int32),
        ("cpu_isa", c_char * 32),
    ]


class RawPenaltyArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("reference", Tensor),
        ("mask", Tensor),
        ("coef", Tensor),
        ("loss_sum", Tensor),
        ("token_count", Tensor),
        ("latent_loss", Tensor),
        ("grad_hidden", Tensor),
        ("accumulate", c_int32),
        ("reserved", c_int32),
        ("scale", c_double),
        ("scale_tensor", Tensor),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("weight", Tensor),
        ("bias", Tensor),
        ("threshold", Tensor),
        ("sign_weight", Tensor),
        ("activation_kind", c_int32),
        ("num_threads", c_int32),
        ("gate_bias", Tensor),
        ("gate_scale", Tensor),
        ("backend", c_int32),
        ("reserved2", c_int32),
    ]


class SaeOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("recipe_json", c_char_p),
        ("input_scale", c_double),
    ]


class SaeDesc(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("encoder_weight", Tensor),
        ("encoder_bias", Tensor),
        ("decoder_bias", Tensor),
        ("decoder_weight", Tensor),
        ("threshold", Tensor),
        ("gate_bias", Tensor),
        ("magnitude_bias", Tensor),
        ("magnitude_log_scale", Tensor),
        ("d_in", c_int64),
        ("d_sae", c_int64),
        ("k", c_int64),
        ("activation_kind", c_int32),
        ("encoder_layout", c_int32),
        ("apply_b_dec_to_input", c_int32),
        ("rescale_acts_by_decoder_norm", c_int32),
        ("input_scale", c_double),
        ("hook_name", c_char_p),
        ("selection", c_int32),
        ("token_norm", c_int32),
        ("center_input", c_int32),
        ("reserved", c_int32),
    ]


class SaeInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("d_in", c_int64),
        ("d_sae", c_int64),
        ("k", c_int64),
        ("layer", c_int64),
        ("scale", c_double),
        ("activation_kind", c_int32),
        ("dtype", c_int32),
        ("b_dec_subtracted", c_int32),
        ("site", c_int32),
    ]


class LatentsDesc(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("ids", POINTER(c_int64)),
        ("signs", POINTER(c_int8)),
        ("weights", POINTER(c_float)),
        ("n", c_size_t),
    ]


class LatentsSaveOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("plan", c_void_p),
        ("sae", c_void_p),
    ]


class LatentsInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("count", c_size_t),
        ("num_positive", c_size_t),
        ("d_in", c_int64),
        ("d_sae", c_int64),
        ("layer", c_int64),
    ]


class PlanOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("backend", c_int32),
        ("activation", c_int32),
        ("num_threads", c_int32),
        ("reserved", c_int32),
        ("part", c_int32),
        ("reserved2", c_int32),
        ("column_begin", c_int64),
        ("column_end", c_int64),
    ]


class PlanInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("d_in", c_int64),
        ("d_sae", c_int64),
        ("num_latents", c_int64),
        ("num_positive", c_int64),
        ("layer", c_int64),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("backend", c_int32),
        ("activation", c_int32),
        ("num_threads", c_int32),
        ("reserved", c_int32),
        ("identity", c_char * 72),
        ("numerics", c_char * 64),
        ("encode_needs_workspace", c_int32),
        ("backward_needs_hidden", c_int32),
    ]


class EncodeArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("latents", Tensor),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
    ]


class PenaltyArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("reference", Tensor),
        ("mask", Tensor),
        ("coef", Tensor),
        ("loss_sum", Tensor),
        ("token_count", Tensor),
        ("latent_loss", Tensor),
        ("grad_hidden", Tensor),
        ("accumulate", c_int32),
        ("reserved", c_int32),
        ("scale", c_double),
        ("scale_tensor", Tensor),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
    ]


class CacheOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("mode", c_int32),
        ("hidden_dtype", c_int32),
        ("layer", c_int64),
        ("base_model", c_char_p),
        ("plan", c_void_p),
        ("site", c_int32),
        ("reserved", c_int32),
    ]


class CacheInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_examples", c_int64),
        ("num_columns", c_int64),
        ("layer", c_int64),
        ("hidden_dtype", c_int32),
        ("site", c_int32),
        ("base_model", c_char * 256),
        ("numerics", c_char * 64),
    ]


class CacheExample(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("num_tokens", c_size_t),
        ("context", c_char_p),
        ("context_size", c_size_t),
    ]


class StatsInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("d_in", c_int64),
        ("d_sae", c_int64),
        ("layer", c_int64),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("backend", c_int32),
        ("activation", c_int32),
        ("num_threads", c_int32),
        ("reserved", c_int32),
        ("identity", c_char * 72),
        ("numerics", c_char * 64),
    ]


class StatsArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("base_hidden", Tensor),
        ("mask", Tensor),
        ("state", Tensor),
        ("token_count", Tensor),
        ("accumulate", c_int32),
        ("reserved", c_int32),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
    ]


class SteeringInfo(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("d_in", c_int64),
        ("num_latents", c_int64),
        ("layer", c_int64),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("backend", c_int32),
        ("num_threads", c_int32),
        ("identity", c_char * 72),
    ]


class SteerArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("row", Tensor),
        ("strength", Tensor),
        ("mask", Tensor),
        ("scale", c_double),
        ("scale_tensor", Tensor),
    ]


class TokenNormsArgs(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("hidden", Tensor),
        ("norms", Tensor),
        ("backend", c_int32),
        ("num_threads", c_int32),
    ]


class MaskOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("spans", c_void_p),
        ("num_spans", c_size_t),
        ("start_marker", c_char_p),
        ("end_marker", c_char_p),
        ("turn_marker", c_char_p),
        ("injected", c_char_p),
        ("closing", c_int32),
        ("border", c_int32),
        ("allow_unclosed", c_int32),
        ("allow_empty", c_int32),
        ("add_special_tokens", c_int32),
        ("other_turns", c_int32),
        ("max_tokens", c_int64),
        ("start_markers", POINTER(c_char_p)),
        ("num_start_markers", c_size_t),
        ("end_markers", POINTER(c_char_p)),
        ("num_end_markers", c_size_t),
        ("turn_markers", POINTER(c_char_p)),
        ("num_turn_markers", c_size_t),
        ("injected_texts", POINTER(c_char_p)),
        ("num_injected_texts", c_size_t),
    ]


# name: (result, arguments); handles are c_void_p.
FUNCTIONS = {
    "blockem_status_name": (c_char_p, [c_int32]),
    "blockem_last_error": (c_size_t, [c_char_p, c_size_t]),
    "blockem_version": (c_uint32, []),
    "blockem_version_string": (c_char_p, []),
    "blockem_build_info_get": (c_int32, [POINTER(BuildInfo)]),
    "blockem_device_count": (c_int32, [c_int32, POINTER(c_int32)]),
    "blockem_raw_penalty_forward": (c_int32, [POINTER(RawPenaltyArgs), c_void_p]),
    "blockem_raw_penalty_backward": (c_int32, [POINTER(RawPenaltyArgs), c_void_p]),
    "blockem_raw_penalty_workspace_size": (
        c_int32,
        [c_int64, c_int64, c_int64, c_int32, c_int32, POINTER(c_size_t)],
    ),
    "blockem_sae_open": (c_int32, [c_char_p, POINTER(SaeOptions), POINTER(c_void_p)]),
    "blockem_sae_from_tensors": (c_int32, [POINTER(SaeDesc), POINTER(c_void_p)]),
    "blockem_sae_info_get": (c_int32, [c_void_p, POINTER(SaeInfo)]),
    "blockem_sae_describe": (c_size_t, [c_void_p, c_char_p, c_size_t]),
    "blockem_sae_free": (None, [c_void_p]),
    "blockem_latents_create": (c_int32, [POINTER(LatentsDesc), POINTER(c_void_p)]),
    "blockem_latents_open": (c_int32, [c_char_p, c_void_p, POINTER(c_void_p)]),
    "blockem_latents_save": (c_int32, [c_void_p, c_char_p, POINTER(LatentsSaveOptions)]),
    "blockem_latents_info_get": (c_int32, [c_void_p, POINTER(LatentsInfo)]),
    "blockem_latents_get": (
        c_int32,
        [c_void_p, POINTER(c_int64), POINTER(c_int8), POINTER(c_float), c_size_t],
    ),
    "blockem_latents_free": (None, [c_void_p]),
    "blockem_plan_create": (
        c_int32,
        [c_void_p, c_void_p, POINTER(PlanOptions), POINTER(c_void_p)],
    ),
    "blockem_plan_info_get": (c_int32, [c_void_p, POINTER(PlanInfo)]),
    "blockem_plan_workspace_size": (c_int32, [c_void_p, c_int64, POINTER(c_size_t)]),
    "blockem_plan_free": (None, [c_void_p]),
    "blockem_encode": (c_int32, [c_void_p, POINTER(EncodeArgs), c_void_p]),
    "blockem_penalty_forward": (c_int32, [c_void_p, POINTER(PenaltyArgs), c_void_p]),
    "blockem_penalty_backward": (c_int32, [c_void_p, POINTER(PenaltyArgs), c_void_p]),
    "blockem_penalty": (c_int32, [c_void_p, POINTER(PenaltyArgs), c_void_p]),
    "blockem_cache_open": (c_int32, [c_char_p, POINTER(CacheOptions), POINTER(c_void_p)]),
    "blockem_cache_info_get": (c_int32, [c_void_p, POINTER(CacheInfo)]),
    "blockem_cache_key": (c_int32, [c_void_p, POINTER(CacheExample), c_char_p]),
    "blockem_cache_example_key": (
        c_int32,
        [c_void_p, POINTER(c_int64), POINTER(c_int64), c_size_t, c_char_p],
    ),
    "blockem_cache_put_note": (c_int32, [c_void_p, c_char_p, c_char_p]),
    "blockem_cache_get_note": (
        c_int32,
        [c_void_p, c_char_p, c_char_p, c_size_t, POINTER(c_size_t)],
    ),
    "blockem_cache_missing": (c_int32, [c_void_p, c_void_p, c_char_p, c_size_t, c_void_p]),
    "blockem_cache_put": (
        c_int32,
        [c_void_p, c_void_p, c_char_p, POINTER(Tensor), c_size_t, POINTER(c_uint64)],
    ),
    "blockem_cache_get": (
        c_int32,
        [c_void_p, c_void_p, c_char_p, POINTER(Tensor), c_size_t],
    ),
    "blockem_cache_free": (None, [c_void_p]),
    "blockem_stats_create": (c_int32, [c_void_p, POINTER(PlanOptions), POINTER(c_void_p)]),
    "blockem_stats_info_get": (c_int32, [c_void_p, POINTER(StatsInfo)]),
    "blockem_stats_workspace_size": (c_int32, [c_void_p, c_int64, c_int32, POINTER(c_size_t)]),
    "blockem_stats_update": (c_int32, [c_void_p, POINTER(StatsArgs), c_void_p]),
    "blockem_stats_free": (None, [c_void_p]),
    "blockem_steering_create": (
        c_int32,
        [c_void_p, POINTER(c_int64), c_size_t, POINTER(PlanOptions), POINTER(c_void_p)],
    ),
    "blockem_steering_info_get": (c_int32, [c_void_p, POINTER(SteeringInfo)]),
    "blockem_steer": (c_int32, [c_void_p, POINTER(SteerArgs), c_void_p]),
    "blockem_steering_free": (None, [c_void_p]),
    "blockem_token_norms": (c_int32, [POINTER(TokenNormsArgs), c_void_p]),
    "blockem_xla_bind": (c_int32, [c_void_p, c_char_p]),
    "blockem_xla_encode_cpu": (c_void_p, [c_void_p]),
    "blockem_xla_encode_cuda": (c_void_p, [c_void_p]),
    "blockem_xla_penalty_forward_cpu": (c_void_p, [c_void_p]),
    "blockem_xla_penalty_forward_cuda": (c_void_p, [c_void_p]),
    "blockem_xla_penalty_backward_cpu": (c_void_p, [c_void_p]),
    "blockem_xla_penalty_backward_cuda": (c_void_p, [c_void_p]),
    "blockem_mask_preset": (c_int32, [c_char_p, POINTER(MaskOptions)]),
    "blockem_mask_from_offsets": (
        c_int32,
        [c_char_p, c_size_t, POINTER(MaskOptions), c_void_p, c_size_t, c_void_p],
    ),
    "blockem_tokenizer_open": (c_int32, [c_char_p, POINTER(c_void_p)]),
    "blockem_tokenizer_from_json": (c_int32, [c_char_p, c_size_t, POINTER(c_void_p)]),
    "blockem_tokenizer_mask": (
        c_int32,
        [c_void_p, c_char_p, c_size_t, POINTER(MaskOptions), c_void_p, c_void_p, c_size_t,
         POINTER(c_size_t)],
    ),
    "blockem_tokenizer_mask_ids": (
        c_int32,
        [c_void_p, c_char_p, c_size_t, POINTER(MaskOptions), c_void_p, c_size_t, c_void_p],
    ),
    "blockem_tokenizer_free": (None, [c_void_p]),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives every function of the header its type; AttributeError where the library lacks one."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
