//! sparsify (EleutherAI): `cfg.json` and `sae.safetensors`.
//!
//! h = relu(E · (x − b_dec) + b), of which the k largest stay; transcoders do not subtract b_dec.

use crate::error::{Result, bail};

use super::Opened;
use super::array::Layout;
use super::config::Config;
use super::found::Found;
use super::source::Source;

pub(super) fn matches(s: &Source<'_>) -> bool {
    let c = &s.container;
    c.has("encoder.weight") && c.has("W_dec") && c.has("b_dec") && !c.has("decoder.weight")
}

pub(super) fn open(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("cfg.json")?;
    refuse_other_rules(&config)?;
    let w_enc = s.linear("encoder.weight")?;
    let b_enc = s.container.need("encoder.bias")?;
    let Some(k) = config.count("k")? else {
        return config.missing("k", "state the number of active latents");
    };
    let Some(transcode) = config.flag("transcode")?.or(s.beside("cfg.json").map(|_| false)) else {
        return config
            .missing("transcode", "state whether the file is a transcoder (true or false)");
    };
    let mut found = Found::standard("sparsify", w_enc, b_enc).topk(k, config.origin())?;
    found.b_dec = Some(s.container.need("b_dec")?);
    found.b_dec_subtracted = !transcode;
    found.w_dec = s.same_width_decoder("W_dec", &found.w_enc, Layout::LatentMajor)?;
    found.hook = hookpoint(s);
    found.open(config)
}

fn refuse_other_rules(config: &Config) -> Result<()> {
    if config.flag("signed")?.unwrap_or(false) {
        bail!(
            Unsupported,
            "{}: the key signed is true: latents of both signs, chosen by their size, which this \
             version does not compute",
            config.origin()
        );
    }
    match config.text("activation")? {
        None | Some("topk" | "groupmax") => Ok(()),
        Some(other) => bail!(
            Unsupported,
            "{}: the activation {other} is not known; known are topk and groupmax",
            config.origin()
        ),
    }
}

/// The folder is named after the module: `layers.12`, `layers.3.mlp`, `embed_tokens`.
fn hookpoint(s: &Source<'_>) -> Option<String> {
    let folder = s.weights().canonicalize().ok()?;
    let name = folder.parent()?.file_name()?.to_str()?;
    let known = name.starts_with("layers.") || name.starts_with("h.") || name == "embed_tokens";
    known.then(|| format!("model.{name}"))
}
