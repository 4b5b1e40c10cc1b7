//! Gemma Scope 1 (`params.npz`, no configuration) and 2 (`params.safetensors`, lower-case names).
//!
//! z = u where u = W_enc · x + b_enc > threshold, else 0. Folders tell the layer. The encoders of
//! their transcoders have the same formula. SAEs of the embedding read it before the model's own
//! factor √d; here x is what the model computes with, so their scale is 1/√d.

use crate::error::Result;

use super::array::Layout;
use super::found::Found;
use super::source::{Source, number_after};
use super::{Opened, Site};

pub(super) fn is_first(s: &Source<'_>) -> bool {
    s.container.kind() == "npz" && s.container.has("W_enc") && s.container.has("threshold")
}

pub(super) fn open_first(s: &Source<'_>) -> Result<Opened> {
    let mut found = read(s, "gemma_scope", ["W_enc", "b_enc", "W_dec"])?;
    found.site = s.folders().find_map(site_of_repository).unwrap_or_default();
    if reads_embedding(s)? {
        found.normalization = "embedding";
        found.scale = 1.0 / (found.w_enc.inputs() as f64).sqrt();
        found.output_scale = found.scale;
        found = found.at(Site::Embedding, None);
    }
    found.open(s.options_config())
}

/// Whether the owner's folder `embedding`, and not `layer_N`, holds the file; or the caller says so.
fn reads_embedding(s: &Source<'_>) -> Result<bool> {
    if let Some(site) = s.options_config().text("site")? {
        return Ok(site == Site::Embedding.name());
    }
    let holder = |name: &&str| *name == "embedding" || number_after(name, "layer_").is_some();
    Ok(s.folders().find(holder) == Some("embedding"))
}

pub(super) fn is_second(s: &Source<'_>) -> bool {
    s.container.has("w_enc") && s.container.has("threshold")
}

pub(super) fn open_second(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("config.json")?;
    let mut found = read(s, "gemma_scope_2", ["w_enc", "b_enc", "w_dec"])?;
    match config.text("hf_hook_point_in")? {
        Some(hook) => {
            found.hook = Some(hook.strip_suffix(".output").unwrap_or(hook).to_string());
        }
        None => {
            let sites = s.folders().find_map(site_of_folder);
            found.site = sites.unwrap_or_default();
        }
    }
    found.model = config.text("model_name")?.map(str::to_string);
    found.open(config)
}

fn read(s: &Source<'_>, format: &'static str, [w, b, d]: [&str; 3]) -> Result<Found> {
    let b_enc = s.container.need(b)?;
    let w_enc = s.oriented(w, &b_enc, Some(Layout::InputMajor))?;
    let mut found = Found::standard(format, w_enc, b_enc).jumprelu(s.container.need("threshold")?);
    found.layer = s.layer_in_path(&["layer_"]);
    found.w_dec = s.same_width_decoder(d, &found.w_enc, Layout::LatentMajor)?;
    Ok(found)
}

/// By the names of the first release: `gemma-scope-2b-pt-mlp`. Its attention SAEs read z; the input
/// of its transcoders is normalised without the norm's gain, which the owner folded into the MLP.
fn site_of_repository(folder: &str) -> Option<Site> {
    let (_, name) = folder.split_once("gemma-scope-")?;
    name.split('-').find_map(|part| match part {
        "res" => Some(Site::BlockOutput),
        "mlp" => Some(Site::MlpOutput),
        "att" => Some(Site::AttentionZ),
        "transcoders" => Some(Site::NormOutput),
        _ => None,
    })
}

/// By the folders of the second release, for those without a configuration.
fn site_of_folder(folder: &str) -> Option<Site> {
    let sites = [
        ("resid_post", Site::BlockOutput),
        ("attn_out", Site::AttentionZ),
        ("mlp_out", Site::MlpOutput),
        ("transcoder", Site::MlpInput),
        ("clt", Site::MlpInput),
    ];
    sites.into_iter().find(|(name, _)| folder.starts_with(name)).map(|(_, site)| site)
}
