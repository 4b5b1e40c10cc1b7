//! dictionary_learning (saprmarks; andyrdt, canrager, SAEBench use it): `ae.pt` and `config.json`.
//!
//! Seven classes, in any container, which the key `trainer.dict_class` (or `dict_class` in the options)
//! names. Without it their tensors tell them apart, but for AutoEncoderTopK and BatchTopKSAE, and for
//! a JumpReluAutoEncoder as safetensors, whose tensors are also SAELens' own.
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
use crate::json;

use super::array::Layout;
use super::checkpoint::GateArrays;
use super::config::Config;
use super::found::{Found, LINEAR_DECODER, calibrated, repeated};
use super::hook::Hook;
use super::source::Source;
use super::{Architecture, Opened, Selection, Site};

const FORMAT: &str = "dictionary_learning";

pub(super) fn matches(s: &Source<'_>) -> bool {
    let c = &s.container;
    let linear = c.has("encoder.weight") && c.has("decoder.weight");
    is_backup(s)
        || linear && (c.has("bias") || c.has("decoder_bias") || c.has("b_dec"))
        || linear && states_class(s)
        || c.has("W_enc") && c.has("group_sizes")
        || c.has("W_enc") && c.has("threshold") && (c.kind() == "torch" || states_class(s))
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
    let layer = trainer("layer").and_then(layer_of).or_else(|| s.layer_in_path(&["layer_"]));
    let submodule = trainer("submodule_name").and_then(|v| v.as_str().map(str::to_string));
    let io = config.find("buffer").and_then(|b| b.get("io")).and_then(Value::as_str);
    let reads_input = io == Some("in");
    let mut found = place(s, found, submodule, layer, reads_input);
    found.model = trainer("lm_name").and_then(|v| v.as_str().map(str::to_string));
    found.open(config)
}

/// The submodule's output, or its input where the run's buffer took that: by the name that the run
/// gave it, else by the folder's, else a block's.
fn place(
    s: &Source<'_>,
    found: Found,
    submodule: Option<String>,
    layer: Option<i64>,
    reads_input: bool,
) -> Found {
    let known = |name: &&str| Hook::parse(name).place.site != Site::Unknown;
    let named = submodule.or_else(|| s.folders().find(known).map(str::to_string));
    let site = match &named {
        None => Site::BlockOutput,
        Some(name) => Hook::parse(name).place.site,
    };
    let site = match site {
        Site::BlockOutput if reads_input => Site::BlockInput,
        Site::AttentionOutput if reads_input => Site::AttentionInput,
        Site::MlpOutput if reads_input => Site::MlpInput,
        _ if reads_input => Site::Unknown,
        site => site,
    };
    match site {
        Site::BlockOutput => found.at_block(layer),
        site => found.at(site, layer),
    }
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

impl Class {
    const ALL: [(Class, &str); 7] = [
        (Class::AutoEncoder, "AutoEncoder"),
        (Class::AutoEncoderNew, "AutoEncoderNew"),
        (Class::Gated, "GatedAutoEncoder"),
        (Class::TopK, "AutoEncoderTopK"),
        (Class::BatchTopK, "BatchTopKSAE"),
        (Class::Matryoshka, "MatryoshkaBatchTopKSAE"),
        (Class::JumpRelu, "JumpReluAutoEncoder"),
    ];

    fn name(self) -> &'static str {
        Class::ALL.iter().find(|(class, _)| *class == self).map_or("", |(_, name)| name)
    }

    fn from_name(name: &str) -> Option<Class> {
        Class::ALL.iter().find(|(_, known)| *known == name).map(|(class, _)| *class)
    }

    /// Whose tensors these are.
    fn of_tensors(s: &Source<'_>) -> &'static [Class] {
        let has = |name: &str| s.container.has(name);
        match () {
            _ if has("group_sizes") => &[Class::Matryoshka],
            _ if has("W_enc") => &[Class::JumpRelu],
            _ if has("r_mag") => &[Class::Gated],
            _ if has("bias") => &[Class::AutoEncoder],
            _ if has("b_dec") => &[Class::TopK, Class::BatchTopK],
            _ => &[Class::AutoEncoderNew],
        }
    }
}

/// The layer of a run, also as text, or as the only one of a list.
fn layer_of(value: Value) -> Option<i64> {
    match value {
        Value::String(text) => text.parse::<u32>().ok().map(i64::from),
        Value::Array(mut list) if list.len() == 1 => list.pop().and_then(layer_of),
        other => other.as_i64(),
    }
}

/// Whether the run's configuration is beside the file, or the caller names a class: the tensors alone
/// are also another format's.
fn states_class(s: &Source<'_>) -> bool {
    let config = s.config_or_options("config.json").ok();
    config.is_some_and(|c| c.find("trainer").is_some() || c.find("dict_class").is_some())
}

fn is_backup(s: &Source<'_>) -> bool {
    s.container.has("ae.encoder.weight") || s.container.has("ae.W_enc")
}

/// By the configuration, which the tensors must fit, else by the tensors.
fn class(s: &Source<'_>, config: &Config) -> Result<Class> {
    let fit = Class::of_tensors(s);
    let trained = config.find("trainer").and_then(|t| t.get("dict_class")).and_then(Value::as_str);
    match (config.text("dict_class")?.or(trained), fit) {
        (Some(name), _) => match Class::from_name(name) {
            Some(class) if fit.contains(&class) => Ok(class),
            Some(_) => {
                let names: Vec<&str> = fit.iter().map(|class| class.name()).collect();
                bail!(
                    Format,
                    "{}: dict_class is {name}, but the tensors are those of {}: the file holds {}",
                    config.origin(),
                    names.join(" or "),
                    s.container.list()
                )
            }
            None => bail!(
                Unsupported,
                "{}: dict_class is {name}, which is not known; known are {}",
                config.origin(),
                Class::ALL.map(|(_, name)| name).join(", ")
            ),
        },
        (None, [only]) => Ok(*only),
        (None, _) => config.missing(
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
    let trained = config.find("trainer").and_then(|t| t.get("k"));
    let k = match (s.number("k")?, config.count("k")?, trained) {
        (Some(stored), ..) => match json::whole(stored).and_then(|k| usize::try_from(k).ok()) {
            Some(k) => k,
            None => {
                bail!(Format, "{}: k is {stored}; it must be a whole number", s.weights().display())
            }
        },
        (None, Some(k), _) => k,
        (None, None, Some(k)) => config.to_count("trainer.k", k)?,
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
    match s.number("threshold")? {
        Some(value) => {
            let label = format!("{}: threshold", s.weights().display());
            Ok(repeated("threshold", calibrated(&label, value, -1.0)?, latents))
        }
        None => bail!(
            RecipeIncomplete,
            "{}: tensor threshold is missing: without it BatchTopK depends on the batch; use a \
             checkpoint of a finished run",
            s.weights().display()
        ),
    }
}
