//! SAEs from arrays that the caller holds.

use crate::error::{Result, bail};
use crate::tensor::{Device, Tensor};

use super::array::{Array, Layout, Matrix};
use super::checkpoint::{Checkpoint, GateArrays};
use super::hook::HookPlace;
use super::{Architecture, Recipe};

/// The arrays of an SAE and how they combine; the names are SAELens'.
///
/// Elements are f32, f16, bf16 or f64, in CPU memory, with any strides.
#[derive(Clone, Debug)]
pub struct SaeTensors<'a> {
    pub architecture: Architecture,
    pub d_in: usize,
    pub d_sae: usize,
    /// Active latents per token; TopK only.
    pub k: Option<usize>,
    /// [d_sae, d_in] or [d_in, d_sae].
    pub encoder: Tensor<'a>,
    /// Which of the two; without it the shape decides, and a square encoder is refused.
    pub encoder_layout: Option<Layout>,
    /// [d_sae]; all but gated.
    pub b_enc: Option<Tensor<'a>>,
    /// [d_in]; needed if `apply_b_dec`.
    pub b_dec: Option<Tensor<'a>>,
    /// [d_sae]; JumpReLU only.
    pub threshold: Option<Tensor<'a>>,
    /// [d_sae]; gated only, as the next two.
    pub b_gate: Option<Tensor<'a>>,
    pub b_mag: Option<Tensor<'a>>,
    pub r_mag: Option<Tensor<'a>>,
    /// [d_sae, d_in]; needed if `fold_decoder_norm`.
    pub decoder: Option<Tensor<'a>>,
    /// b_dec is subtracted from the (scaled) input.
    pub apply_b_dec: bool,
    /// Pre-activations are scaled by the norm of their decoder row; TopK only.
    pub fold_decoder_norm: bool,
    /// The input is multiplied by this first; 1 for none.
    pub scale: f64,
    pub hook: Option<String>,
    pub model: Option<String>,
}

impl<'a> SaeTensors<'a> {
    /// The smallest description: nothing optional is set.
    pub fn new(
        architecture: Architecture,
        d_in: usize,
        d_sae: usize,
        encoder: Tensor<'a>,
    ) -> SaeTensors<'a> {
        SaeTensors {
            architecture,
            d_in,
            d_sae,
            k: None,
            encoder,
            encoder_layout: None,
            b_enc: None,
            b_dec: None,
            threshold: None,
            b_gate: None,
            b_mag: None,
            r_mag: None,
            decoder: None,
            apply_b_dec: false,
            fold_decoder_norm: false,
            scale: 1.0,
            hook: None,
            model: None,
        }
    }
}

/// Copies and checks the arrays.
pub(super) fn adopt(t: &SaeTensors<'_>) -> Result<(Recipe, Checkpoint)> {
    check_rules(t)?;
    let gated = t.architecture == Architecture::Gated;
    let (bias, bias_name) = if gated { (t.b_mag, "b_mag") } else { (t.b_enc, "b_enc") };
    let gate = match gated {
        true => Some(GateArrays {
            b_gate: needed("b_gate", t.b_gate, t.architecture)?,
            r_mag: needed("r_mag", t.r_mag, t.architecture)?,
        }),
        false => None,
    };
    let threshold = match t.architecture {
        Architecture::JumpRelu => Some(needed("threshold", t.threshold, t.architecture)?),
        _ => None,
    };
    let decoder = t.decoder.filter(|_| t.fold_decoder_norm);
    let w_dec = decoder.map(|d| copy("decoder", &d)).transpose()?;
    let checkpoint = Checkpoint {
        w_enc: Matrix::new(copy("encoder", &t.encoder)?, encoder_layout(t)?),
        b_enc: needed(bias_name, bias, t.architecture)?,
        threshold,
        gate,
        b_dec: t.b_dec.filter(|_| t.apply_b_dec).map(|b| copy("b_dec", &b)).transpose()?,
        w_dec: w_dec.map(|array| Matrix::new(array, Layout::LatentMajor)),
        stored: None,
    };
    checkpoint.check()?;
    let place = t.hook.as_deref().map(HookPlace::parse).unwrap_or_default();
    let recipe = Recipe {
        format: "tensors",
        architecture: t.architecture,
        d_in: t.d_in,
        d_sae: t.d_sae,
        k: t.k.filter(|_| t.architecture == Architecture::TopK),
        dtype: t.encoder.dtype,
        b_dec_subtracted: t.apply_b_dec,
        normalization: if t.scale == 1.0 { "none" } else { "expected_average_only_in" }.to_string(),
        scale: t.scale,
        decoder_norm_folded: t.fold_decoder_norm,
        hook: t.hook.clone(),
        layer: place.layer,
        hidden_states_index: place.hidden_states_index,
        model: t.model.clone(),
    };
    Ok((recipe, checkpoint))
}

/// What must hold before any array is looked at.
fn check_rules(t: &SaeTensors<'_>) -> Result<()> {
    if !(t.scale.is_finite() && t.scale > 0.0) {
        bail!(InvalidArgument, "the scale is {}; it must be above 0 and finite", t.scale);
    }
    if t.apply_b_dec && t.b_dec.is_none() {
        bail!(TensorMissing, "b_dec is missing, but apply_b_dec is set");
    }
    if t.fold_decoder_norm && t.decoder.is_none() {
        bail!(TensorMissing, "the decoder is missing, but fold_decoder_norm is set");
    }
    if t.fold_decoder_norm && t.architecture != Architecture::TopK {
        bail!(
            InvalidArgument,
            "fold_decoder_norm is a rule of topk, not of {}",
            t.architecture.name()
        );
    }
    if t.architecture == Architecture::TopK {
        match t.k {
            None => bail!(RecipeIncomplete, "k is missing; a topk SAE needs it"),
            Some(k) if !(1..=t.d_sae).contains(&k) => {
                bail!(InvalidArgument, "k is {k}; the SAE has {} latents", t.d_sae)
            }
            _ => {}
        }
    }
    Ok(())
}

fn encoder_layout(t: &SaeTensors<'_>) -> Result<Layout> {
    let fits = |layout: Layout| t.encoder.shape() == layout.shape(t.d_sae, t.d_in);
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
            t.encoder.shape(),
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
