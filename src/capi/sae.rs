use std::ffi::c_char;

use serde_json::Value;

use super::raw::{
    BLOCKEM_ACTIVATION_KIND_GATED, BLOCKEM_ACTIVATION_KIND_JUMPRELU, BLOCKEM_ACTIVATION_KIND_RELU,
    BLOCKEM_ACTIVATION_KIND_TOPK,
};
use super::tensor::blockem_tensor;
use super::{
    blockem_status, check_out, free, guard, handle, read_options, read_path, read_struct,
    read_text, status, versioned, write_struct, write_text,
};
use crate::error::{Result, bail};
use crate::json;
use crate::sae::{Architecture, Layout, Sae, SaeOptions, SaeTensors, Selection, TokenNorm};

/// [d, F] or [F, d], told from the shape; an error where d = F.
pub const BLOCKEM_ENCODER_LAYOUT_AUTO: i32 = 0;
/// [d, F]: a latent is a column.
pub const BLOCKEM_ENCODER_LAYOUT_D_F: i32 = 1;
/// [F, d]: a latent is a row.
pub const BLOCKEM_ENCODER_LAYOUT_F_D: i32 = 2;

/// A TOPK SAE keeps each token's k largest latents that are above 0.
pub const BLOCKEM_SELECTION_LARGEST: i32 = 0;
/// It keeps each token's k largest in magnitude, with their signs.
pub const BLOCKEM_SELECTION_MAGNITUDE: i32 = 1;
/// It keeps the largest of each of k equal groups, where that is above 0.
pub const BLOCKEM_SELECTION_GROUPS: i32 = 2;
/// It keeps the k T largest of a batch of T tokens, which no plan computes natively.
pub const BLOCKEM_SELECTION_BATCH: i32 = 3;

/// Hidden is encoded as it is.
pub const BLOCKEM_TOKEN_NORM_NONE: i32 = 0;
/// Every h becomes h sqrt(d) / |h|.
pub const BLOCKEM_TOKEN_NORM_CONSTANT: i32 = 1;
/// Every h becomes (h - mean) / (deviation + 1e-5), with the unbiased standard deviation.
pub const BLOCKEM_TOKEN_NORM_LAYER: i32 = 2;

/// Neither the file, its folders nor the options say where the SAE reads, or in words not known.
pub const BLOCKEM_SITE_UNKNOWN: i32 = 0;
/// The residual stream that enters a block. Of a known block it is told as what leaves the block
/// before, or as EMBEDDING.
pub const BLOCKEM_SITE_BLOCK_INPUT: i32 = 1;
/// The residual stream that leaves a block.
pub const BLOCKEM_SITE_BLOCK_OUTPUT: i32 = 2;
/// What the attention adds to the residual stream, after a norm of its own where the model has one.
pub const BLOCKEM_SITE_ATTENTION_OUTPUT: i32 = 3;
/// What the MLP adds to the residual stream, after a norm of its own where the model has one.
pub const BLOCKEM_SITE_MLP_OUTPUT: i32 = 4;
/// The heads' values, concatenated, before the attention's output projection.
pub const BLOCKEM_SITE_ATTENTION_Z: i32 = 5;
/// The input of block 0.
pub const BLOCKEM_SITE_EMBEDDING: i32 = 6;
/// The residual stream between the attention and the MLP.
pub const BLOCKEM_SITE_BLOCK_MIDDLE: i32 = 7;
/// What the MLP reads, after its norm.
pub const BLOCKEM_SITE_MLP_INPUT: i32 = 8;
/// The output of a module that is none of the others; "hook" of blockem_sae_describe names it.
pub const BLOCKEM_SITE_MODULE_OUTPUT: i32 = 9;
/// What the attention reads, after its norm.
pub const BLOCKEM_SITE_ATTENTION_INPUT: i32 = 10;
/// The attention's keys, before rotation.
pub const BLOCKEM_SITE_KEYS: i32 = 11;
/// The attention's values.
pub const BLOCKEM_SITE_VALUES: i32 = 12;
/// What a norm makes of its input before its own weight and bias.
pub const BLOCKEM_SITE_NORM_OUTPUT: i32 = 13;
/// What a linear layer reads.
pub const BLOCKEM_SITE_LINEAR_INPUT: i32 = 14;

/// An opened sparse autoencoder. Immutable; any thread may use it.
pub struct blockem_sae(pub(super) Sae);

/// What the caller knows about a checkpoint and its file may not say.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_sae_options {
    /// sizeof(blockem_sae_options), set by BLOCKEM_SAE_OPTIONS_INIT.
    pub struct_size: usize,
    /// A JSON object of configuration keys by their SAELens names, such as
    /// {"architecture": "jumprelu", "d_in": 4096}: completes or overrides the file's own. "format"
    /// names the format of tensors that fit several, "center_input" says whether the SAE reads hidden
    /// less its mean over d; "site" ("mlp_output" and the other names of BLOCKEM_SITE_... in lower
    /// case) and "layer", or "hook_name", say where it reads. Or NULL.
    pub recipe_json: *const c_char,
    /// sqrt(d) / mean norm of hidden, for a file that needs a scale and does not hold it; 0 means
    /// not given.
    pub input_scale: f64,
}
versioned!(blockem_sae_options, first_size = 24, last = input_scale: f64);

/// An SAE as arrays on the host, F32, F16, BF16 or F64, which are copied.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_sae_desc {
    /// sizeof(blockem_sae_desc), set by BLOCKEM_SAE_DESC_INIT.
    pub struct_size: usize,
    /// [d, F] or [F, d].
    pub encoder_weight: blockem_tensor,
    /// [F]; absent for GATED.
    pub encoder_bias: blockem_tensor,
    /// [d], optional; needed with apply_b_dec_to_input.
    pub decoder_bias: blockem_tensor,
    /// [F, d], optional; needed with rescale_acts_by_decoder_norm, and by blockem_steering_create.
    pub decoder_weight: blockem_tensor,
    /// [F], JUMPRELU only.
    pub threshold: blockem_tensor,
    /// [F] b_gate, GATED only.
    pub gate_bias: blockem_tensor,
    /// [F] b_mag, GATED only.
    pub magnitude_bias: blockem_tensor,
    /// [F] r_mag, GATED only: the magnitude path is e^r_mag (W . h) + b_mag.
    pub magnitude_log_scale: blockem_tensor,
    /// d
    pub d_in: i64,
    /// F
    pub d_sae: i64,
    /// Active latents per token, TOPK only.
    pub k: i64,
    /// BLOCKEM_ACTIVATION_KIND_...
    pub activation_kind: i32,
    /// BLOCKEM_ENCODER_LAYOUT_...
    pub encoder_layout: i32,
    /// 1 subtracts decoder_bias from hidden before encoding.
    pub apply_b_dec_to_input: i32,
    /// 1 scales each latent by the norm of its decoder row, TOPK only.
    pub rescale_acts_by_decoder_norm: i32,
    /// Hidden is multiplied by it before encoding; 0 means 1.
    pub input_scale: f64,
    /// Where hidden is read, or NULL: a name of TransformerLens ("blocks.19.hook_resid_post"), of a
    /// Hugging Face module ("model.layers.19.mlp.output") or of sparsify ("layers.19.mlp").
    pub hook_name: *const c_char,
    /// BLOCKEM_SELECTION_..., TOPK only.
    pub selection: i32,
    /// BLOCKEM_TOKEN_NORM_...; excludes input_scale and center_input.
    pub token_norm: i32,
    /// 1 subtracts from every h its mean over d before anything else, as TransformerLens' models with
    /// center_writing_weights do.
    pub center_input: i32,
    /// Zero.
    pub reserved: i32,
}
versioned!(blockem_sae_desc, first_size = 768, last = reserved: i32);

/// What an SAE is, in numbers; blockem_sae_describe has all of it. Filled by blockem_sae_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_sae_info {
    /// sizeof(blockem_sae_info), set by BLOCKEM_SAE_INFO_INIT.
    pub struct_size: usize,
    /// d
    pub d_in: i64,
    /// F
    pub d_sae: i64,
    /// Active latents per token of a TOPK SAE, else 0.
    pub k: i64,
    /// 0-based decoder block in which the site lies: at BLOCK_OUTPUT the one whose output is read;
    /// -1 when unknown, and for EMBEDDING.
    pub layer: i64,
    /// Hidden is multiplied by it before encoding (folded into the rows).
    pub scale: f64,
    /// BLOCKEM_ACTIVATION_KIND_...
    pub activation_kind: i32,
    /// BLOCKEM_DTYPE_... of the encoder in the file.
    pub dtype: i32,
    /// 1 when b_dec is subtracted before encoding (folded into the bias).
    pub b_dec_subtracted: i32,
    /// BLOCKEM_SITE_..., the place of the model that the SAE reads.
    pub site: i32,
}
versioned!(blockem_sae_info, first_size = 64, last = site: i32);

/// Opens a checkpoint: the file or folder that its owner publishes (SAELens, Gemma Scope, Llama Scope,
/// Goodfire, sparsify, dictionary_learning and others: README.md has the table; safetensors, npz, and
/// PyTorch's .pt and .pth, which are read as data and run nothing), or a safetensors file that states
/// its recipe, also in shards (model.safetensors.index.json). Tensors and shapes tell the format. Reads headers only; rows are read by
/// blockem_plan_create. The file stays open until the handle is freed and must not change.
/// path: UTF-8. options: NULL or what the file does not say.
/// out: a new handle, to be freed with blockem_sae_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT, IO, FORMAT, TENSOR_MISSING,
/// RECIPE_INCOMPLETE, UNSAFE_PICKLE, UNSUPPORTED, NON_FINITE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_sae_open(
    path: *const c_char,
    options: *const blockem_sae_options,
    out: *mut *mut blockem_sae,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a NUL-terminated path and a sized struct, or NULL.
        let (path, options) = unsafe { (read_path(path)?, read_options("options", options)?) };
        let options = match options {
            // SAFETY: recipe_json is NULL or NUL-terminated.
            Some(options) => unsafe { sae_options(&options) }?,
            None => SaeOptions::default(),
        };
        let sae = Sae::open(path, &options)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_sae(sae))) };
        Ok(())
    })
}

/// Makes an SAE from arrays on the host, which are copied.
/// out: a new handle, to be freed with blockem_sae_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT, SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH,
/// TENSOR_MISSING, RECIPE_INCOMPLETE (k of a TOPK SAE), NON_FINITE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_sae_from_tensors(
    desc: *const blockem_sae_desc,
    out: *mut *mut blockem_sae,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        let desc = unsafe { read_struct("desc", desc) }?;
        // SAFETY: tensors are valid for what they say until the call returns.
        let sae = Sae::from_tensors(&unsafe { sae_tensors(&desc) }?)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_sae(sae))) };
        Ok(())
    })
}

/// Describes an SAE in numbers.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_sae_info_get(
    sae: *const blockem_sae,
    info: *mut blockem_sae_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let recipe = unsafe { handle("sae", sae)?.0.recipe() };
        let value = blockem_sae_info {
            struct_size: size_of::<blockem_sae_info>(),
            d_in: recipe.d_in as i64,
            d_sae: recipe.d_sae as i64,
            k: recipe.k.unwrap_or(0) as i64,
            layer: recipe.layer.unwrap_or(-1),
            scale: recipe.scale,
            activation_kind: recipe.architecture as i32,
            dtype: recipe.dtype as i32,
            b_dec_subtracted: recipe.b_dec_subtracted as i32,
            site: recipe.site as i32,
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// The resolved recipe as JSON: format, architecture, d_in, d_sae, k, dtype, activation,
/// b_dec_subtracted, normalization, center_input, scale, threshold {min, median, max}, hook, site
/// (a name of BLOCKEM_SITE_... in lower case), layer, hidden_states_index and more.
/// Writes at most cap bytes including the final NUL (buf NULL or cap 0 writes nothing) and returns
/// the full length without the NUL; 0 on error, with blockem_last_error. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_sae_describe(
    sae: *const blockem_sae,
    buf: *mut c_char,
    cap: usize,
) -> usize {
    let mut length = 0;
    let status = guard(|| {
        // SAFETY: a live handle, or NULL.
        let text = unsafe { handle("sae", sae)?.0.describe()? }.to_string();
        // SAFETY: the caller's buffer has cap bytes.
        length = unsafe { write_text(&text, buf, cap) };
        Ok(())
    });
    if status == status::BLOCKEM_STATUS_OK { length } else { 0 }
}

/// Frees an SAE; NULL is legal. Plans made from it live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_sae_free(sae: *mut blockem_sae) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(sae) }
}

/// # Safety
/// recipe_json must be NULL or NUL-terminated.
unsafe fn sae_options(options: &blockem_sae_options) -> Result<SaeOptions> {
    // SAFETY: the caller's promise.
    let recipe = match unsafe { read_text("recipe_json", options.recipe_json) }? {
        None => None,
        Some(text) => match json::parse(text.as_bytes()) {
            Ok(Value::Object(recipe)) => Some(recipe),
            Ok(_) => bail!(InvalidArgument, "recipe_json is not a JSON object"),
            Err(reason) => bail!(InvalidArgument, "recipe_json: {reason}"),
        },
    };
    Ok(SaeOptions { recipe, input_scale: given_scale(options.input_scale)? })
}

fn given_scale(scale: f64) -> Result<Option<f64>> {
    match scale {
        0.0 => Ok(None),
        scale if scale.is_finite() && scale > 0.0 => Ok(Some(scale)),
        scale => bail!(InvalidArgument, "input_scale is {scale}; it must be positive"),
    }
}

/// # Safety
/// Tensors must be valid for what they say, for 'a.
unsafe fn sae_tensors<'a>(desc: &blockem_sae_desc) -> Result<SaeTensors<'a>> {
    let size = |name, value| match usize::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!(InvalidArgument, "{name} is negative: {value}"),
    };
    let flag = |name, value| match value {
        0 => Ok(false),
        1 => Ok(true),
        other => bail!(InvalidArgument, "{name} must be 0 or 1, not {other}"),
    };
    if desc.reserved != 0 {
        bail!(InvalidArgument, "desc.reserved is {}; expected 0", desc.reserved);
    }
    let k = size("k", desc.k)?;
    // SAFETY: the caller's promise.
    unsafe {
        Ok(SaeTensors {
            architecture: architecture(desc.activation_kind)?,
            d_in: size("d_in", desc.d_in)?,
            d_sae: size("d_sae", desc.d_sae)?,
            k: (k > 0).then_some(k),
            selection: selection(desc.selection)?,
            encoder_weight: desc.encoder_weight.required("encoder_weight")?,
            encoder_layout: encoder_layout(desc.encoder_layout)?,
            encoder_bias: desc.encoder_bias.optional("encoder_bias")?,
            decoder_bias: desc.decoder_bias.optional("decoder_bias")?,
            threshold: desc.threshold.optional("threshold")?,
            gate_bias: desc.gate_bias.optional("gate_bias")?,
            magnitude_bias: desc.magnitude_bias.optional("magnitude_bias")?,
            magnitude_log_scale: desc.magnitude_log_scale.optional("magnitude_log_scale")?,
            decoder_weight: desc.decoder_weight.optional("decoder_weight")?,
            apply_b_dec_to_input: flag("apply_b_dec_to_input", desc.apply_b_dec_to_input)?,
            rescale_acts_by_decoder_norm: flag(
                "rescale_acts_by_decoder_norm",
                desc.rescale_acts_by_decoder_norm,
            )?,
            input_scale: given_scale(desc.input_scale)?.unwrap_or(1.0),
            token_norm: token_norm(desc.token_norm)?,
            center_input: flag("center_input", desc.center_input)?,
            hook_name: read_text("hook_name", desc.hook_name)?.map(str::to_owned),
            model: None,
        })
    }
}

fn architecture(kind: i32) -> Result<Architecture> {
    match kind {
        BLOCKEM_ACTIVATION_KIND_RELU => Ok(Architecture::Standard),
        BLOCKEM_ACTIVATION_KIND_JUMPRELU => Ok(Architecture::JumpRelu),
        BLOCKEM_ACTIVATION_KIND_GATED => Ok(Architecture::Gated),
        BLOCKEM_ACTIVATION_KIND_TOPK => Ok(Architecture::TopK),
        other => bail!(InvalidArgument, "an SAE has no activation kind {other}"),
    }
}

fn selection(code: i32) -> Result<Selection> {
    match code {
        BLOCKEM_SELECTION_LARGEST => Ok(Selection::Largest),
        BLOCKEM_SELECTION_MAGNITUDE => Ok(Selection::Magnitude),
        BLOCKEM_SELECTION_GROUPS => Ok(Selection::Groups),
        BLOCKEM_SELECTION_BATCH => Ok(Selection::Batch),
        other => bail!(InvalidArgument, "there is no selection {other}"),
    }
}

fn token_norm(code: i32) -> Result<TokenNorm> {
    match code {
        BLOCKEM_TOKEN_NORM_NONE => Ok(TokenNorm::None),
        BLOCKEM_TOKEN_NORM_CONSTANT => Ok(TokenNorm::Constant),
        BLOCKEM_TOKEN_NORM_LAYER => Ok(TokenNorm::Layer),
        other => bail!(InvalidArgument, "there is no token norm {other}"),
    }
}

fn encoder_layout(layout: i32) -> Result<Option<Layout>> {
    match layout {
        BLOCKEM_ENCODER_LAYOUT_AUTO => Ok(None),
        BLOCKEM_ENCODER_LAYOUT_D_F => Ok(Some(Layout::InputMajor)),
        BLOCKEM_ENCODER_LAYOUT_F_D => Ok(Some(Layout::LatentMajor)),
        other => bail!(InvalidArgument, "there is no encoder layout {other}"),
    }
}
