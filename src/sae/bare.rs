//! A bare safetensors file: SAELens' tensor names, with the recipe in `__metadata__` (its keys
//! flat, or as one JSON object under `cfg`) or in the options.
//!
//! The encoder may lie either way; the length of its bias tells which. Where d_sae == d_in that
//! does not, and the key `layout` must: `latent_major` ([d_sae, d_in]) or `input_major`
//! ([d_in, d_sae]). Decoders lie as [d_sae, d_in] then.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::error::{Result, Status, bail};

use super::Opened;
use super::array::Layout;
use super::config::Config;
use super::container::Container;
use super::saelens::{self, Rules};
use super::source::Source;

pub(super) fn open(source: Source<'_>) -> Result<Opened> {
    let (container, options) = (source.container, source.options);
    let path = container.file().path().to_path_buf();
    let config = Config::from_metadata(&path, container.metadata(), options.recipe.as_ref())?;
    let rules = Rules::read(&config, saelens::Source::Bare, options)?;
    let layout = layout(&container, &config, rules.latent_vector())?;
    let checkpoint = rules.find_arrays(&container, &config, layout)?;
    let recipe = rules.recipe("safetensors", &config, &checkpoint)?;
    let converted = container.metadata().and_then(provenance);
    Ok(Opened { recipe, checkpoint, config: config.into_file(), converted })
}

/// What `blockem convert` wrote about the file that it read.
fn provenance(metadata: &HashMap<String, String>) -> Option<Value> {
    let by = metadata.get("converted_by")?;
    let said = |key: &str| metadata.get(key);
    Some(json!({
        "by": by,
        "source": said("source"),
        "source_format": said("source_format"),
        "source_bytes": said("source_bytes").and_then(|bytes| bytes.parse::<u64>().ok()),
    }))
}

/// Which axis of W_enc is as long as the bias.
fn layout(container: &Container, config: &Config, bias: &str) -> Result<Layout> {
    let (w_enc, bias) = (container.need("W_enc")?, container.need(bias)?);
    if let Some(name) = config.text("layout")? {
        match Layout::from_name(name) {
            Some(layout) => return Ok(layout),
            None => bail!(
                Format,
                "{}: the key layout is {name}; it must be latent_major or input_major",
                config.origin()
            ),
        }
    }
    match (w_enc.shape(), bias.shape()) {
        ([a, b], [n]) if a == n && b == n => config.missing(
            "layout",
            "W_enc is square, so its shape does not tell which axis is which: state latent_major \
             (a row per latent) or input_major (as in SAELens)",
        ),
        ([a, _], [n]) if a == n => Ok(Layout::LatentMajor),
        ([_, b], [n]) if b == n => Ok(Layout::InputMajor),
        (shape, n) => {
            let text = format!("has the shape {shape:?}, which does not fit a bias of shape {n:?}");
            Err(w_enc.fault(Status::Format, text))
        }
    }
}
