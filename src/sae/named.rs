//! Formats without rules of their own in the file: what their owners' pages say.
//!
//! ```text
//! Qwen-Scope   the k largest of relu(W_enc x + b_enc)     W_enc [F, d], k in the repository's name
//! ckkissane    relu((x − b_dec) W_enc + b_enc)            W_enc [d, F], `…_cfg.json`, x = hook_z
//! mwhanna      relu(W_enc x + b_enc)                      W_enc [F, d], a transcoder's encoder
//! qresearch    relu(E x + b)                              linear layers and nothing else
//! OpenAI       relu(E (x − pre_bias) + latent_bias), or the k largest for x after layer norm
//! ```
//!
//! The tensors of Qwen-Scope and mwhanna are the same, and those of qresearch are also another
//! format's without its configuration: these need the caller's word, `format` in the recipe.

use crate::error::{Result, bail};
use crate::json;

use super::array::Layout;
use super::found::{Found, LINEAR_DECODER};
use super::source::Source;
use super::{Opened, Selection, Site, TokenNorm};

/// Matrices under the names of SAELens, without a threshold.
pub(super) fn is_matrices(s: &Source<'_>) -> bool {
    let c = &s.container;
    let plain = c.has("W_enc") && c.has("b_enc") && c.has("W_dec") && !c.has("threshold");
    plain && (c.kind() == "torch" || matches!(s.given_format(), Some("qwen_scope" | "mwhanna")))
}

pub(super) fn open_matrices(s: &Source<'_>) -> Result<Opened> {
    let stem = s.weights().file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let cfg = stem.map(|stem| format!("{stem}_cfg.json")).unwrap_or_default();
    match s.given_format() {
        Some("qwen_scope") => open_qwen_scope(s),
        Some("mwhanna") => open_mwhanna(s),
        None if s.beside(&cfg).is_some() => open_hook_z(s, &cfg),
        _ => s.options_config().missing(
            "format",
            "the tensors are those of several formats: state qwen_scope (top-k, with k) or mwhanna \
             (a transcoder's relu) in the options' recipe, or put the file's _cfg.json beside it",
        ),
    }
}

fn open_qwen_scope(s: &Source<'_>) -> Result<Opened> {
    let config = s.options_config();
    let b_enc = s.container.need("b_enc")?;
    let w_enc = s.oriented("W_enc", &b_enc, Some(Layout::LatentMajor))?;
    let Some(k) = config.count("k")? else {
        return config.missing("k", "it is the number behind L0_ in the repository's name");
    };
    let mut found =
        Found::standard("qwen_scope", w_enc, b_enc).topk(k, Selection::Largest, config.origin())?;
    found.w_dec = s.decoder("W_dec", &found.w_enc, LINEAR_DECODER)?;
    found.b_dec = s.container.find("b_dec")?;
    found.at_block(s.layer_in_path(&["layer"])).open(config)
}

fn open_mwhanna(s: &Source<'_>) -> Result<Opened> {
    let b_enc = s.container.need("b_enc")?;
    let w_enc = s.oriented("W_enc", &b_enc, Some(Layout::LatentMajor))?;
    let found = Found::standard("mwhanna", w_enc, b_enc);
    found.at(Site::MlpInput, s.layer_in_path(&["layer_"])).open(s.options_config())
}

fn open_hook_z(s: &Source<'_>, cfg: &str) -> Result<Opened> {
    let config = s.config_or_options(cfg)?;
    let b_enc = s.container.need("b_enc")?;
    let w_enc = s.oriented("W_enc", &b_enc, Some(Layout::InputMajor))?;
    for (key, found) in [("act_size", w_enc.inputs()), ("dict_size", w_enc.latents())] {
        if config.count(key)?.is_some_and(|said| said != found) {
            bail!(Format, "{}: the key {key} is not {found}, as W_enc says", config.origin());
        }
    }
    let mut found = Found::standard("hook_z", w_enc, b_enc);
    found.b_dec = Some(s.container.need("b_dec")?);
    found.b_dec_subtracted = true;
    found.w_dec = s.decoder("W_dec", &found.w_enc, Layout::LatentMajor)?;
    found.hook = config.text("act_name")?.map(str::to_string);
    found.open(config)
}

pub(super) fn is_qresearch(s: &Source<'_>) -> bool {
    let c = &s.container;
    c.has("encoder.weight") && c.has("encoder.bias") && c.has("decoder.weight")
}

pub(super) fn open_qresearch(s: &Source<'_>) -> Result<Opened> {
    let config = s.options_config();
    if s.given_format() != Some("qresearch") {
        return config.missing(
            "format",
            "the tensors are those of several formats, and their configuration is not beside the \
             file (hyperparams.json of Llama Scope, config.json of dictionary_learning): put it \
             there, or state qresearch (plain relu) in the options' recipe",
        );
    }
    let w_enc = s.linear("encoder.weight")?;
    let mut found = Found::standard("qresearch", w_enc, s.container.need("encoder.bias")?);
    found.w_dec = s.decoder("decoder.weight", &found.w_enc, LINEAR_DECODER)?;
    found.hook = s.layer_in_path(&["l"]).map(|n| format!("blocks.{n}.hook_resid_post"));
    found.open(config)
}

pub(super) fn is_openai(s: &Source<'_>) -> bool {
    s.container.has("pre_bias") && s.container.has("latent_bias")
}

pub(super) fn open_openai(s: &Source<'_>) -> Result<Opened> {
    let config = s.options_config();
    let w_enc = s.linear("encoder.weight")?;
    let mut found = Found::standard("openai", w_enc, s.container.need("latent_bias")?);
    let path = s.weights().display().to_string();
    match s.container.value("activation").and_then(|v| v.as_str()) {
        Some("ReLU") => {}
        Some("TopK") => {
            let k = openai_k(s, &path)?;
            found = found.topk(k, Selection::Largest, &path)?;
            found = found.normalized(TokenNorm::Layer, TokenNorm::Layer.name());
        }
        _ => bail!(Format, "{path}: the value activation is neither ReLU nor TopK"),
    }
    found.b_dec = Some(s.container.need("pre_bias")?);
    found.b_dec_subtracted = true;
    found.w_dec = s.decoder("decoder.weight", &found.w_enc, LINEAR_DECODER)?;
    let (site, layer) = openai_place(s);
    found.at(site, layer).open(config)
}

/// The owner keeps `resid_post_mlp_v5_32k/autoencoders/8.pt`: a site with the run's version, and a
/// layer.
fn openai_place(s: &Source<'_>) -> (Site, Option<i64>) {
    let sites = [
        ("mlp_post_act", Site::LinearInput),
        ("resid_delta_attn", Site::AttentionOutput),
        ("resid_post_attn", Site::BlockMiddle),
        ("resid_delta_mlp", Site::MlpOutput),
        ("resid_post_mlp", Site::BlockOutput),
    ];
    let site_of = |folder: &str| {
        sites.into_iter().find(|(name, _)| folder.starts_with(name)).map(|(_, site)| site)
    };
    let stem = s.weights().file_stem().and_then(|stem| stem.to_str());
    let layer = stem.and_then(|stem| stem.parse::<u32>().ok()).map(i64::from);
    match s.folders().find_map(site_of) {
        Some(site) => (site, layer),
        None => (Site::Unknown, None),
    }
}

/// k of `activation_state_dict`, whose values must be rectified.
fn openai_k(s: &Source<'_>, path: &str) -> Result<usize> {
    let part = |key| s.container.value(&format!("activation_state_dict.{key}"));
    match part("postact_fn").and_then(|v| v.as_str()) {
        Some("ReLU") => {}
        other => bail!(
            Unsupported,
            "{path}: the value postact_fn of activation_state_dict is {}; ReLU is read",
            other.unwrap_or("missing")
        ),
    }
    match part("k").and_then(json::whole_number).and_then(|k| usize::try_from(k).ok()) {
        Some(k) => Ok(k),
        None => bail!(RecipeIncomplete, "{path}: activation_state_dict does not hold a whole k"),
    }
}
