//! What TransformerLens changes of a model as it loads it, and with it of the hidden states that an
//! SAE reads: the key `model_from_pretrained_kwargs`.
//!
//! ```text
//! center_writing_weights   whatever writes to the residual stream loses its mean over d, in models
//!                          with LayerNorm: the SAE reads h - mean(h). `center_input` says so here.
//! fold_value_biases        values, and so z, lose the value bias
//! refactor_factored_attn_matrices    queries, keys, values and z are turned
//! fold_ln                  a norm's output, with its weight and bias, becomes the output without them
//! center_unembed           logits alone
//! ```
//!
//! Where the key is absent SAELens changes nothing (`from_pretrained_no_processing`), but for the
//! releases of which its own index says otherwise. SAELens before version 3 (whose key is
//! `hook_point`) changed all of it.

use std::path::Path;

use serde_json::Value;

use crate::error::{Result, bail};

use super::TokenNorm;
use super::config::Config;
use super::site::{Site, Stated};

const KWARGS: &str = "model_from_pretrained_kwargs";
const CENTERED: &str = "center_writing_weights";

/// Repositories that SAELens' index (pretrained_saes.yaml of 6.54) loads with centred weights:
/// gpt2-small-res-jb, gpt2-small-res-jb-feature-splitting and gpt2-small-mlp-tm.
const CENTERED_REPOSITORIES: [&str; 3] = [
    "GPT2-Small-SAEs-Reformatted",
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "gpt2-small-mlp-out-saes",
];

/// Families of models with RMSNorm, which TransformerLens does not centre.
const RMS_FAMILIES: [&str; 12] = [
    "llama", "gemma", "mistral", "mixtral", "qwen", "phi-3", "phi-4", "deepseek", "olmo-2",
    "granite", "smollm", "yi-",
];
/// Families with LayerNorm for which SAEs were published before SAELens 3.
const LAYER_NORM_FAMILIES: [&str; 5] = ["gpt2", "pythia", "gpt-neo", "gelu", "tiny-stories"];

/// Whether the SAE reads hidden states less their mean over d.
pub(super) fn center_input(
    config: &Config,
    folder: Option<&Path>,
    token_norm: TokenNorm,
) -> Result<bool> {
    let centered = match config.flag("center_input")? {
        Some(stated) => stated,
        None => is_centered(config, folder)?,
    };
    match (centered, token_norm) {
        (true, TokenNorm::Constant) => bail!(
            Unsupported,
            "{}: the SAE reads centred hidden states ({CENTERED} or center_input is true) that are \
             scaled to a constant norm (normalize_activations), which no library has; correct one key",
            config.origin()
        ),
        // It centres by itself.
        (centered, norm) => Ok(centered && norm != TokenNorm::Layer),
    }
}

/// By the file, and by SAELens' index.
fn is_centered(config: &Config, folder: Option<&Path>) -> Result<bool> {
    let site = Stated::read(&config.file_alone())?.resolve(config)?.1.site;
    let model = config.text("model_name")?.unwrap_or_default().to_lowercase();
    let is_of = |families: &[&str]| families.iter().any(|family| model.contains(family));
    let Some(kwargs) = config.find(KWARGS) else {
        if folder.is_some_and(is_centered_repository) {
            return Ok(is_written(site));
        }
        let early = config.find("hook_point").is_some();
        if early && is_written(site) && is_of(&LAYER_NORM_FAMILIES) {
            return config.missing(
                "center_input",
                "the SAE was trained by a SAELens before version 3, which centred the hidden states \
                 of models with LayerNorm: state true to read it like that (as SAELens' index does \
                 for gpt2-small-res-jb and gpt2-small-mlp-tm), or false (as SAELens does with a file \
                 that says nothing)",
            );
        }
        return Ok(false);
    };
    let Value::Object(kwargs) = kwargs else {
        bail!(
            Format,
            "{}: the key {KWARGS} is {kwargs}; it must be an object of TransformerLens' options",
            config.origin()
        );
    };
    let is_true = |key: &str| match kwargs.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => bail!(
            Format,
            "{}: the key {KWARGS}.{key} is {other}; it must be true or false",
            config.origin()
        ),
    };
    // These take parameters of the model out of what the SAE reads.
    for (key, changed) in [
        ("fold_value_biases", &[Site::AttentionZ, Site::Values][..]),
        ("refactor_factored_attn_matrices", &[Site::AttentionZ, Site::Values, Site::Keys]),
        ("fold_ln", &[Site::MlpInput, Site::AttentionInput]),
    ] {
        if is_true(key)? && changed.contains(&site) {
            bail!(
                Unsupported,
                "{}: the key {KWARGS}.{key} is true, so the SAE reads at {} what TransformerLens makes \
                 of the model's weights, and a plain model has something else there; if it changes \
                 nothing in this model, state \"{KWARGS}\": {{\"{key}\": false}} in the options' recipe",
                config.origin(),
                site.name()
            );
        }
    }
    if !is_true(CENTERED)? || is_of(&RMS_FAMILIES) {
        return Ok(false);
    }
    match site {
        Site::Unknown | Site::ModuleOutput => config.missing(
            "center_input",
            "the key model_from_pretrained_kwargs.center_writing_weights is true, and the hook does \
             not tell whether it reads the residual stream or what is added to it: state true if so, \
             else false",
        ),
        site => Ok(is_written(site)),
    }
}

/// The residual stream, and what is added to it: what loses its mean.
fn is_written(site: Site) -> bool {
    use Site::*;
    matches!(site, BlockInput | BlockOutput | BlockMiddle | AttentionOutput | MlpOutput | Embedding)
}

/// In the Hugging Face cache (`models--OWNER--NAME`), or in a folder of the repository's name.
fn is_centered_repository(folder: &Path) -> bool {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    folder.iter().filter_map(|part| part.to_str()).any(|part| {
        let name = part.rsplit("--").next().unwrap_or(part);
        CENTERED_REPOSITORIES.contains(&name)
    })
}
