//! Gemma Scope 1 (`params.npz`, no configuration) and 2 (`params.safetensors`, lower-case names).
//!
//! z = u where u = W_enc · x + b_enc > threshold, else 0. Folders tell the layer. The encoders of
//! their transcoders have the same formula. SAEs of the embedding read it before the model's own
//! factor √d; here x is what the model computes with, so their scale is 1/√d.

use crate::error::Result;

use super::Opened;
use super::array::Layout;
use super::found::Found;
use super::source::Source;

pub(super) fn is_first(s: &Source<'_>) -> bool {
    s.container.kind() == "npz" && s.container.has("W_enc") && s.container.has("threshold")
}

pub(super) fn open_first(s: &Source<'_>) -> Result<Opened> {
    let mut found = read(s, "gemma_scope", ["W_enc", "b_enc", "W_dec"])?;
    if s.is_below("embedding") {
        found.normalization = "embedding";
        found.scale = 1.0 / (found.w_enc.inputs() as f64).sqrt();
        found.output_scale = found.scale;
        found.layer = None;
    }
    found.open(s.options_config())
}

pub(super) fn is_second(s: &Source<'_>) -> bool {
    s.container.has("w_enc") && s.container.has("threshold")
}

pub(super) fn open_second(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("config.json")?;
    let mut found = read(s, "gemma_scope_2", ["w_enc", "b_enc", "w_dec"])?;
    if let Some(hook) = config.text("hf_hook_point_in")? {
        found.hook = Some(hook.strip_suffix(".output").unwrap_or(hook).to_string());
    }
    found.model = config.text("model_name")?.map(str::to_string);
    found.open(config)
}

fn read(s: &Source<'_>, format: &'static str, [w, b, d]: [&str; 3]) -> Result<Found> {
    let b_enc = s.container.need(b)?;
    let w_enc = s.oriented(w, &b_enc, Some(Layout::InputMajor))?;
    let layer = s.layer_in_path(&["layer_"]);
    let mut found = Found::standard(format, w_enc, b_enc)
        .jumprelu(s.container.need("threshold")?)
        .at(None, layer);
    found.w_dec = s.same_width_decoder(d, &found.w_enc, Layout::LatentMajor)?;
    Ok(found)
}
