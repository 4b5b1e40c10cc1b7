//! SAEs from arrays that the caller holds.

use crate::error::{Result, bail};
use crate::tensor::{Device, Tensor};

use super::array::{Array, Layout, Matrix};
use super::checkpoint::{Checkpoint, GateArrays};
use super::hook::Hook;
use super::{Architecture, Recipe, Selection, TokenNorm};

/// The arrays of an SAE and how they combine; the names are those of the C header.
///
/// Elements are f32, f16, bf16 or f64, in CPU memory, with any strides.
#[derive(Clone, Debug)]
pub struct SaeTensors<'a> {
    pub architecture: Architecture,
    pub d_in: usize,
    pub d_sae: usize,
    /// Active latents per token; TopK only.
    pub k: Option<usize>,
    /// Which those are; TopK only.
    pub selection: Selection,
    /// [d_sae, d_in] or [d_in, d_sae].
    pub encoder_weight: Tensor<'a>,
    /// Which of the two; without it the shape decides, and a square encoder is refused.
    pub encoder_layout: Option<Layout>,
    /// [d_sae]; all but gated.
    pub encoder_bias: Option<Tensor<'a>>,
    /// [d_in]; needed if `apply_b_dec_to_input`.
    pub decoder_bias: Option<Tensor<'a>>,
    /// [d_sae]; JumpReLU only.
    pub threshold: Option<Tensor<'a>>,
    /// [d_sae]; gated only, as the next two.
    pub gate_bias: Option<Tensor<'a>>,
    pub magnitude_bias: Option<Tensor<'a>>,
    pub magnitude_log_scale: Option<Tensor<'a>>,
    /// [d_sae, d_in]; needed if `rescale_acts_by_decoder_norm`, and by what steers.
    pub decoder_weight: Option<Tensor<'a>>,
    /// b_dec is subtracted from the (scaled) input.
    pub apply_b_dec_to_input: bool,
    /// Pre-activations are scaled by the norm of their decoder row; TopK only.
    pub rescale_acts_by_decoder_norm: bool,
    /// The input is multiplied by this first; 1 for none.
    pub input_scale: f64,
    /// Every token of the input is normalised first; excludes an `input_scale`.
    pub token_norm: TokenNorm,
    /// Every token's mean over d is subtracted before anything else.
    pub center_input: bool,
    pub hook_name: Option<String>,
    pub model: Option<String>,
}

impl<'a> SaeTensors<'a> {
    /// The smallest description: nothing optional is set.
    pub fn new(
        architecture: Architecture,
        d_in: usize,
        d_sae: usize,
        encoder_weight: Tensor<'a>,
    ) -> SaeTensors<'a> {
        SaeTensors {
            architecture,
            d_in,
            d_sae,
            k: None,
            selection: Selection::Largest,
            encoder_weight,
            encoder_layout: None,
            encoder_bias: None,
            decoder_bias: None,
            threshold: None,
            gate_bias: None,
            magnitude_bias: None,
            magnitude_log_scale: None,
            decoder_weight: None,
            apply_b_dec_to_input: false,
            rescale_acts_by_decoder_norm: false,
            input_scale: 1.0,
            token_norm: TokenNorm::None,
            center_input: false,
            hook_name: None,
            model: None,
        }
    }
}

/// Copies and checks the arrays.
pub(super) fn adopt(t: &SaeTensors<'_>) -> Result<(Recipe, Checkpoint)> {
    check_rules(t)?;
    let gated = t.architecture == Architecture::Gated;
    let (bias, bias_name) =
        if gated { (t.magnitude_bias, "magnitude_bias") } else { (t.encoder_bias, "encoder_bias") };
    let gate = match gated {
        true => Some(GateArrays {
            b_gate: needed("gate_bias", t.gate_bias, t.architecture)?,
            r_mag: needed("magnitude_log_scale", t.magnitude_log_scale, t.architecture)?,
        }),
        false => None,
    };
    let threshold = match t.architecture {
        Architecture::JumpRelu => Some(needed("threshold", t.threshold, t.architecture)?),
        _ => None,
    };
    let w_dec = t.decoder_weight.map(|d| copy("decoder_weight", &d)).transpose()?;
    let checkpoint = Checkpoint {
        w_enc: Matrix::new(copy("encoder_weight", &t.encoder_weight)?, encoder_layout(t)?),
        b_enc: needed(bias_name, bias, t.architecture)?,
        threshold,
        gate,
        glu: None,
        b_dec: t.decoder_bias.map(|b| copy("decoder_bias", &b)).transpose()?,
        w_dec: w_dec.map(|array| Matrix::new(array, Layout::LatentMajor)),
        stored: None,
    };
    checkpoint.check()?;
    let place = t.hook_name.as_deref().map(Hook::parse).unwrap_or_default().place;
    let recipe = Recipe {
        format: "tensors",
        architecture: t.architecture,
        d_in: t.d_in,
        d_sae: t.d_sae,
        k: t.k,
        selection: t.selection,
        dtype: t.encoder_weight.dtype,
        b_dec_subtracted: t.apply_b_dec_to_input,
        normalization: match t.token_norm {
            TokenNorm::None if t.input_scale != 1.0 => "expected_average_only_in",
            norm => norm.name(),
        }
        .to_string(),
        token_norm: t.token_norm,
        center_input: t.center_input,
        scale: t.input_scale,
        output_scale: t.input_scale,
        threshold_on_decoder_norm: false,
        glu: false,
        decoder_norm_folded: t.rescale_acts_by_decoder_norm,
        hook: t.hook_name.clone(),
        site: place.site,
        layer: place.layer,
        hidden_states_index: place.hidden_states_index,
        model: t.model.clone(),
    };
    Ok((recipe, checkpoint))
}

/// What must hold before any array is looked at.
fn check_rules(t: &SaeTensors<'_>) -> Result<()> {
    if !(t.input_scale.is_finite() && t.input_scale > 0.0) {
        bail!(InvalidArgument, "input_scale is {}; it must be above 0 and finite", t.input_scale);
    }
    if t.token_norm != TokenNorm::None && t.input_scale != 1.0 {
        bail!(
            InvalidArgument,
            "input_scale is {}, but {} normalises every token; leave one out",
            t.input_scale,
            t.token_norm.name()
        );
    }
    if t.center_input && t.token_norm != TokenNorm::None {
        bail!(
            InvalidArgument,
            "center_input is set, but {} normalises every token; leave one out",
            t.token_norm.name()
        );
    }
    if t.apply_b_dec_to_input && t.decoder_bias.is_none() {
        bail!(TensorMissing, "decoder_bias is missing, but apply_b_dec_to_input is set");
    }
    if t.rescale_acts_by_decoder_norm && t.decoder_weight.is_none() {
        bail!(TensorMissing, "decoder_weight is missing, but rescale_acts_by_decoder_norm is set");
    }
    if t.rescale_acts_by_decoder_norm && t.architecture != Architecture::TopK {
        bail!(
            InvalidArgument,
            "rescale_acts_by_decoder_norm is a rule of topk, not of {}",
            t.architecture.name()
        );
    }
    let gated = t.architecture == Architecture::Gated;
    let jumprelu = t.architecture == Architecture::JumpRelu;
    let foreign = [
        ("encoder_bias", t.encoder_bias.is_some() && gated),
        ("threshold", t.threshold.is_some() && !jumprelu),
        ("gate_bias", t.gate_bias.is_some() && !gated),
        ("magnitude_bias", t.magnitude_bias.is_some() && !gated),
        ("magnitude_log_scale", t.magnitude_log_scale.is_some() && !gated),
        ("k", t.k.is_some() && t.architecture != Architecture::TopK),
        ("selection", t.selection != Selection::Largest && t.architecture != Architecture::TopK),
    ];
    if let Some((name, _)) = foreign.iter().find(|(_, given)| *given) {
        bail!(InvalidArgument, "{name} was given, but {} has none", t.architecture.name());
    }
    if t.architecture == Architecture::TopK {
        match t.k {
            None => bail!(RecipeIncomplete, "k is missing; a topk SAE needs it"),
            Some(k) if !(1..=t.d_sae).contains(&k) => {
                bail!(InvalidArgument, "k is {k}; the SAE has {} latents", t.d_sae)
            }
            Some(k) if t.selection == Selection::Groups && !t.d_sae.is_multiple_of(k) => {
                bail!(InvalidArgument, "k is {k}: {} latents are not {k} equal groups", t.d_sae)
            }
            _ => {}
        }
    }
    Ok(())
}

fn encoder_layout(t: &SaeTensors<'_>) -> Result<Layout> {
    let fits = |layout: Layout| t.encoder_weight.shape() == layout.shape(t.d_sae, t.d_in);
    match t.encoder_layout {
        Some(layout) if fits(layout) => Ok(layout),
        None if t.d_in == t.d_sae && fits(Layout::LatentMajor) => bail!(
            InvalidArgument,
            "the encoder is square, so its shape does not tell which axis is which: state the \
             encoder's layout"
        ),
        None if fits(Layout::LatentMajor) => Ok(Layout::LatentMajor),
        None if fits(Layout::InputMajor) => Ok(Layout::InputMajor),
        _ => bail!(
            Shape,
            "the encoder has the shape {:?}, which does not fit d_sae {} and d_in {}",
            t.encoder_weight.shape(),
            t.d_sae,
            t.d_in
        ),
    }
}

fn needed(name: &str, tensor: Option<Tensor<'_>>, architecture: Architecture) -> Result<Array> {
    match tensor {
        Some(tensor) => copy(name, &tensor),
        None => bail!(TensorMissing, "{name} is missing; {} SAEs need it", architecture.name()),
    }
}

/// A row-major copy, all of whose elements are finite.
fn copy(name: &str, tensor: &Tensor<'_>) -> Result<Array> {
    let shape = tensor.shape();
    if tensor.device != Device::Cpu {
        bail!(DeviceMismatch, "tensor {name} is not in CPU memory; copy it there first");
    }
    let (Some((inner, outer)), [stride_outer @ .., stride_inner]) =
        (shape.split_last(), tensor.stride())
    else {
        bail!(Shape, "tensor {name} has no dimensions");
    };
    if outer.len() > 1 {
        bail!(Shape, "tensor {name} has the shape {shape:?}; expected one or two dimensions");
    }
    let rows = outer.first().copied().unwrap_or(1);
    let row_stride = stride_outer.first().copied().unwrap_or(0);
    let size = tensor.dtype.size();
    let mut bytes = Vec::new();
    let total = rows.checked_mul(*inner).and_then(|n| n.checked_mul(size));
    if total.is_none_or(|n| bytes.try_reserve_exact(n).is_err()) {
        bail!(InvalidArgument, "tensor {name} of shape {shape:?} does not fit into memory");
    }
    if tensor.data.is_null() && total != Some(0) {
        bail!(NullPointer, "tensor {name} has no data");
    }
    for row in 0..rows {
        for i in 0..*inner {
            let at = (row * row_stride + i * stride_inner) * size;
            // SAFETY: (row, i) lies in the shape, so the view reaches these bytes; they are plain
            // numbers, read as bytes and so without any alignment.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(tensor.data.add(at), size)
            });
        }
    }
    let array = Array::in_memory(name, tensor.dtype, shape, bytes);
    array.expect_float()?;
    array.expect_finite()?;
    Ok(array)
}
