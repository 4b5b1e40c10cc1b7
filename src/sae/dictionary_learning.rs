//! dictionary_learning (saprmarks; andyrdt, canrager, SAEBench use it): `ae.pt` and `config.json`.
//!
//! Seven classes, told apart by their tensors; only AutoEncoderTopK and BatchTopKSAE have the same
//! ones, and the key `trainer.dict_class` (or `dict_class` in the options) must say which it is.
//! E is [F, d], W_enc is [d, F]:
//!
//! ```text
//! AutoEncoder             n·relu(E (x − bias) + b)    n the decoder's norms, as the library loads it
//! AutoEncoderNew          relu(E x + b)
//! GatedAutoEncoder        e = E (x − decoder_bias): relu(e^r_mag e + mag_bias) where e + gate_bias > 0
//! AutoEncoderTopK         the k largest of relu(E (x − b_dec) + b)
//! BatchTopKSAE            h = relu(E (x − b_dec) + b) where h > threshold, one number
//! MatryoshkaBatchTopKSAE  the same with W_enc, b_enc
//! JumpReluAutoEncoder     h = x W_enc + b_enc where h > threshold, one for each latent
//! ```

use serde_json::Value;

use crate::error::{Result, bail};

use super::array::Layout;
use super::checkpoint::GateArrays;
use super::config::Config;
use super::found::{Found, LINEAR_DECODER, calibrated, integer};
use super::source::Source;
use super::{Architecture, Opened, Selection};

const FORMAT: &str = "dictionary_learning";

pub(super) fn matches(s: &Source<'_>) -> bool {
    let c = &s.container;
    let linear = c.has("encoder.weight") && c.has("decoder.weight");
    is_backup(s)
        || linear && (c.has("bias") || c.has("decoder_bias") || c.has("b_dec"))
        || linear && states_class(s)
        || c.has("W_enc") && c.has("group_sizes")
        || c.has("W_enc") && c.kind() == "torch" && c.has("threshold")
}

pub(super) fn open(s: &Source<'_>) -> Result<Opened> {
    if is_backup(s) {
        bail!(
            Unsupported,
            "{}: a backup that a training run wrote (its tensors lie under ae., beside the \
             optimizer's): its weights are not scaled back yet; use the run's final ae.pt",
            s.weights().display()
        );
    }
    let config = s.config_or_options("config.json")?;
    let found = match class(s, &config)? {
        Class::AutoEncoder => auto_encoder(s)?,
        Class::AutoEncoderNew => linear(s, None)?,
        Class::Gated => gated(s)?,
        Class::TopK => topk(s, &config)?,
        Class::BatchTopK => {
            let found = linear(s, Some("b_dec"))?;
            let threshold = threshold(s, found.w_enc.latents())?;
            found.jumprelu(threshold)
        }
        Class::Matryoshka => {
            let found = matrices(s, true)?;
            let threshold = threshold(s, found.w_enc.latents())?;
            found.jumprelu(threshold)
        }
        Class::JumpRelu => matrices(s, false)?.jumprelu(s.container.need("threshold")?),
    };
    let trainer = |key: &str| config.find("trainer").and_then(|t| t.get(key)).cloned();
    let layer = trainer("layer").and_then(|v| v.as_i64()).or_else(|| s.layer_in_path(&["layer_"]));
    let at_block = trainer("submodule_name")
        .and_then(|v| v.as_str().map(str::to_string))
        .is_none_or(|name| name.starts_with("resid_post"));
    let hook = layer.filter(|_| at_block).map(|n| format!("model.layers.{n}"));
    let mut found = found.at(hook, layer);
    found.model = trainer("lm_name").and_then(|v| v.as_str().map(str::to_string));
    found.open(config)
}

#[derive(Clone, Copy, PartialEq)]
enum Class {
    AutoEncoder,
    AutoEncoderNew,
    Gated,
    TopK,
    BatchTopK,
    Matryoshka,
    JumpRelu,
}

/// Whether the run's configuration is beside the file, or the caller names a class: linear layers
/// alone are also another format's.
fn states_class(s: &Source<'_>) -> bool {
    let config = s.config_or_options("config.json").ok();
    config.is_some_and(|c| c.find("trainer").is_some() || c.find("dict_class").is_some())
}

fn is_backup(s: &Source<'_>) -> bool {
    s.container.has("ae.encoder.weight") || s.container.has("ae.W_enc")
}

/// By the tensors, and by the configuration where two classes have the same ones.
fn class(s: &Source<'_>, config: &Config) -> Result<Class> {
    let has = |name: &str| s.container.has(name);
    if has("group_sizes") {
        return Ok(Class::Matryoshka);
    }
    if has("W_enc") {
        return Ok(Class::JumpRelu);
    }
    if has("r_mag") {
        return Ok(Class::Gated);
    }
    if has("bias") {
        return Ok(Class::AutoEncoder);
    }
    if !has("b_dec") {
        return Ok(Class::AutoEncoderNew);
    }
    let named = config.find("trainer").and_then(|t| t.get("dict_class")).and_then(Value::as_str);
    match config.text("dict_class")?.or(named) {
        Some("AutoEncoderTopK") => Ok(Class::TopK),
        Some("BatchTopKSAE") => Ok(Class::BatchTopK),
        Some(other) => bail!(
            Format,
            "{}: dict_class is {other}, but the tensors are those of AutoEncoderTopK or BatchTopKSAE",
            config.origin()
        ),
        None => config.missing(
            "dict_class",
            "the tensors are those of AutoEncoderTopK and of BatchTopKSAE alike: put the run's \
             config.json beside the file, or state dict_class in the options' recipe",
        ),
    }
}

/// Linear layers; `b_dec` is subtracted from the input.
fn linear(s: &Source<'_>, b_dec: Option<&str>) -> Result<Found> {
    let w_enc = s.linear("encoder.weight")?;
    let mut found = Found::standard(FORMAT, w_enc, s.container.need("encoder.bias")?);
    found.w_dec = s.decoder("decoder.weight", &found.w_enc, LINEAR_DECODER)?;
    found.b_dec = b_dec.map(|name| s.container.need(name)).transpose()?;
    found.b_dec_subtracted = b_dec.is_some();
    Ok(found)
}

fn auto_encoder(s: &Source<'_>) -> Result<Found> {
    let mut found = linear(s, Some("bias"))?;
    if found.w_dec.is_none() {
        s.container.need("decoder.weight")?;
    }
    found.decoder_norm_folded = true;
    Ok(found)
}

fn gated(s: &Source<'_>) -> Result<Found> {
    let w_enc = s.linear("encoder.weight")?;
    let mut found = Found::standard(FORMAT, w_enc, s.container.need("mag_bias")?);
    found.architecture = Architecture::Gated;
    found.gate = Some(GateArrays {
        b_gate: s.container.need("gate_bias")?,
        r_mag: s.container.need("r_mag")?,
    });
    found.b_dec = Some(s.container.need("decoder_bias")?);
    found.b_dec_subtracted = true;
    found.w_dec = s.decoder("decoder.weight", &found.w_enc, LINEAR_DECODER)?;
    Ok(found)
}

fn topk(s: &Source<'_>, config: &Config) -> Result<Found> {
    let stored = s.container.find("k")?.map(|k| integer(&k)).transpose()?;
    let trained =
        config.find("trainer").and_then(|t| t.get("k")).map(|k| config.to_count("trainer.k", k));
    let k = match (stored, config.count("k")?, trained.transpose()?) {
        (Some(k), ..) | (None, Some(k), _) | (None, None, Some(k)) => k,
        _ => return config.missing("k", "state the number of active latents"),
    };
    linear(s, Some("b_dec"))?.topk(k, Selection::Largest, config.origin())
}

/// W_enc [d, F]; only the BatchTopK kind subtracts b_dec.
fn matrices(s: &Source<'_>, b_dec_subtracted: bool) -> Result<Found> {
    let b_enc = s.container.need("b_enc")?;
    let w_enc = s.oriented("W_enc", &b_enc, Some(Layout::InputMajor))?;
    let mut found = Found::standard(FORMAT, w_enc, b_enc);
    found.w_dec = s.decoder("W_dec", &found.w_enc, Layout::LatentMajor)?;
    found.b_dec = Some(s.container.need("b_dec")?);
    found.b_dec_subtracted = b_dec_subtracted;
    Ok(found)
}

/// The one number that calibration left.
fn threshold(s: &Source<'_>, latents: usize) -> Result<super::Array> {
    match s.container.find("threshold")? {
        Some(threshold) => calibrated(&threshold, latents),
        None => bail!(
            RecipeIncomplete,
            "{}: tensor threshold is missing: without it BatchTopK depends on the batch; use a \
             checkpoint of a finished run",
            s.weights().display()
        ),
    }
}
