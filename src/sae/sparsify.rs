//! sparsify (EleutherAI): `cfg.json` and `sae.safetensors`.
//!
//! h = relu(E · (x − b_dec) + b), of which the k largest stay; transcoders do not subtract b_dec.
//! `groupmax`: the largest of each of k equal groups. Old files with `signed`: without relu, the k
//! largest in magnitude.

use crate::error::{Result, bail};

use super::array::Layout;
use super::config::Config;
use super::found::Found;
use super::hook::Hook;
use super::source::Source;
use super::{Opened, Selection, Site};

pub(super) fn matches(s: &Source<'_>) -> bool {
    let c = &s.container;
    c.has("encoder.weight") && c.has("W_dec") && c.has("b_dec") && !c.has("decoder.weight")
}

pub(super) fn open(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("cfg.json")?;
    let selection = selection(&config)?;
    let w_enc = s.linear("encoder.weight")?;
    let b_enc = s.container.need("encoder.bias")?;
    let Some(k) = config.count("k")? else {
        return config.missing("k", "state the number of active latents");
    };
    let Some(transcode) = config.flag("transcode")?.or(s.beside("cfg.json").map(|_| false)) else {
        return config
            .missing("transcode", "state whether the file is a transcoder (true or false)");
    };
    let mut found =
        Found::standard("sparsify", w_enc, b_enc).topk(k, selection, config.origin())?;
    found.b_dec = Some(s.container.need("b_dec")?);
    found.b_dec_subtracted = !transcode;
    found.w_dec = s.same_width_decoder("W_dec", &found.w_enc, Layout::LatentMajor)?;
    found.hook = hookpoint(s).map(|module| match transcode {
        // A transcoder reads what its module reads.
        true => format!("{module}.input"),
        false => module,
    });
    found.open(config)
}

fn selection(config: &Config) -> Result<Selection> {
    let signed = config.flag("signed")?.unwrap_or(false);
    match config.text("activation")? {
        None | Some("topk") if signed => Ok(Selection::Magnitude),
        None | Some("topk") => Ok(Selection::Largest),
        Some("groupmax") if !signed => Ok(Selection::Groups),
        Some("groupmax") => bail!(
            Format,
            "{}: the key signed is true, which contradicts the activation groupmax",
            config.origin()
        ),
        Some(other) => bail!(
            Unsupported,
            "{}: the activation {other} is not known; known are topk and groupmax",
            config.origin()
        ),
    }
}

/// The folder is named after the module, below the model without its head: `layers.12`,
/// `layers.3.mlp`, `embed_tokens`; the first uploads said `layer_12`.
fn hookpoint(s: &Source<'_>) -> Option<String> {
    s.folder().find_map(|name| {
        if let Some(n) = name.strip_prefix("layer_") {
            return n.parse::<u32>().ok().map(|n| format!("model.layers.{n}"));
        }
        let known = Hook::parse(name).place.site != Site::Unknown;
        let below = ["layers.", "h.", "embed_tokens"].iter().any(|word| name.starts_with(word));
        match known {
            true if below => Some(format!("model.{name}")),
            true if name.contains('.') => Some(name.to_string()),
            _ => None,
        }
    })
}
