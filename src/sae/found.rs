//! What a format found, before it is checked: arrays and rules, with the defaults of most formats.

use crate::error::{Result, Status, bail};
use crate::tensor::DType;

use super::array::{Array, Layout, Matrix};
use super::checkpoint::{Checkpoint, GateArrays, GluArrays};
use super::config::Config;
use super::site::{Site, Stated};
use super::{Architecture, Opened, Recipe, Selection, TokenNorm};

pub(super) struct Found {
    pub format: &'static str,
    pub architecture: Architecture,
    pub k: Option<usize>,
    pub selection: Selection,
    pub w_enc: Matrix,
    /// Of a gated SAE the magnitude bias.
    pub b_enc: Array,
    pub threshold: Option<Array>,
    pub gate: Option<GateArrays>,
    pub glu: Option<GluArrays>,
    pub b_dec: Option<Array>,
    pub b_dec_subtracted: bool,
    pub w_dec: Option<Matrix>,
    pub decoder_norm_folded: bool,
    pub threshold_on_decoder_norm: bool,
    pub normalization: &'static str,
    pub token_norm: TokenNorm,
    pub scale: f64,
    /// What the decoder's norms are divided by.
    pub output_scale: f64,
    pub hook: Option<String>,
    /// Where no hook tells.
    pub site: Site,
    pub layer: Option<i64>,
    pub model: Option<String>,
}

impl Found {
    /// z = relu(W_enc · h + b_enc), nothing folded.
    pub fn standard(format: &'static str, w_enc: Matrix, b_enc: Array) -> Found {
        Found {
            format,
            architecture: Architecture::Standard,
            k: None,
            selection: Selection::Largest,
            w_enc,
            b_enc,
            threshold: None,
            gate: None,
            glu: None,
            b_dec: None,
            b_dec_subtracted: false,
            w_dec: None,
            decoder_norm_folded: false,
            threshold_on_decoder_norm: false,
            normalization: "none",
            token_norm: TokenNorm::None,
            scale: 1.0,
            output_scale: 1.0,
            hook: None,
            site: Site::Unknown,
            layer: None,
            model: None,
        }
    }

    /// The same with a threshold for each latent.
    pub fn jumprelu(self, threshold: Array) -> Found {
        Found { architecture: Architecture::JumpRelu, threshold: Some(threshold), ..self }
    }

    /// The k largest.
    pub fn topk(self, k: usize, selection: Selection, origin: &str) -> Result<Found> {
        check_k(k, selection, self.w_enc.latents(), origin)?;
        Ok(Found { architecture: Architecture::TopK, k: Some(k), selection, ..self })
    }

    /// Every token is normalised, in the words of the file.
    pub fn normalized(self, token_norm: TokenNorm, normalization: &'static str) -> Found {
        Found { token_norm, normalization, ..self }
    }

    /// The site of a block that the owner's pages, or names of folders, say.
    pub fn at(self, site: Site, layer: Option<i64>) -> Found {
        Found { site, layer, ..self }
    }

    /// The output of a decoder block, by the name that its module has in Hugging Face.
    pub fn at_block(self, layer: Option<i64>) -> Found {
        let hook = layer.map(|n| format!("model.layers.{n}"));
        Found { hook, ..self.at(Site::BlockOutput, layer) }
    }

    pub fn open(self, config: Config) -> Result<Opened> {
        let stated = Stated {
            hook: self.hook,
            site: Some(self.site).filter(|site| *site != Site::Unknown),
            layer: self.layer,
            ..Stated::default()
        };
        let (hook, place) = stated.resolve(&config)?;
        let recipe = Recipe {
            format: self.format,
            architecture: self.architecture,
            d_in: self.w_enc.inputs(),
            d_sae: self.w_enc.latents(),
            k: self.k,
            selection: self.selection,
            dtype: self.w_enc.array().dtype(),
            b_dec_subtracted: self.b_dec_subtracted,
            normalization: self.normalization.to_string(),
            token_norm: self.token_norm,
            center_input: false,
            scale: self.scale,
            output_scale: self.output_scale,
            decoder_norm_folded: self.decoder_norm_folded,
            threshold_on_decoder_norm: self.threshold_on_decoder_norm,
            glu: self.glu.is_some(),
            hook,
            site: place.site,
            layer: place.layer,
            hidden_states_index: place.hidden_states_index,
            model: self.model,
        };
        let checkpoint = Checkpoint {
            w_enc: self.w_enc,
            b_enc: self.b_enc,
            threshold: self.threshold,
            gate: self.gate,
            glu: self.glu,
            b_dec: self.b_dec,
            w_dec: self.w_dec,
            stored: None,
        };
        checkpoint.check()?;
        Ok(Opened { recipe, checkpoint, config: config.into_file(), converted: None })
    }
}

/// k must leave every latent, or every group of them, something to win.
pub(super) fn check_k(k: usize, selection: Selection, d_sae: usize, origin: &str) -> Result<()> {
    if !(1..=d_sae).contains(&k) {
        bail!(Format, "{origin}: the key k is {k}; the SAE has {d_sae} latents");
    }
    if selection == Selection::Groups && !d_sae.is_multiple_of(k) {
        bail!(Format, "{origin}: the key k is {k}, and {d_sae} latents are not {k} equal groups");
    }
    Ok(())
}

/// One number for each latent.
pub(super) fn repeated(name: &str, value: f64, count: usize) -> Array {
    let bytes = value.to_le_bytes().repeat(count);
    Array::in_memory(name, DType::F64, &[count], bytes)
}

/// The one number of an array without dimensions (or with one element).
pub(super) fn scalar(array: &Array) -> Result<f64> {
    match (array.shape().iter().product::<usize>(), array.dtype()) {
        (1, DType::I64 | DType::U8 | DType::Bool) => Ok(array.integers()?[0] as f64),
        (1, _) => array.finite(array.vector()?[0], String::new),
        (n, _) => Err(array.fault(Status::Shape, format!("has {n} elements; expected one"))),
    }
}

/// e^x of every element.
pub(super) fn exp(array: &Array) -> Result<Array> {
    array.expect_float()?;
    let mut bytes = Vec::with_capacity(array.shape().iter().product::<usize>() * size_of::<f64>());
    array.visit(|_, x| {
        bytes.extend(x.exp().to_le_bytes());
        Ok(())
    })?;
    Ok(Array::in_memory("threshold", DType::F64, array.shape(), bytes))
}

/// The one threshold of all latents, which training has moved from where it started.
pub(super) fn calibrated(label: &str, value: f64, start: f64) -> Result<f64> {
    if value < 0.0 || value == start {
        bail!(
            RecipeIncomplete,
            "{label} is {value}: training never calibrated it, and reading it as zero would turn \
             BatchTopK into a plain ReLU; use a finished checkpoint"
        );
    }
    Ok(value)
}

/// The file says that a matrix lies as linear layers keep their output weights.
pub(super) const LINEAR_DECODER: Layout = Layout::InputMajor;
