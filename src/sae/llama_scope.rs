//! Llama Scope (OpenMOSS, fnlp): linear layers beside `hyperparams.json` (2024) or, with thresholds
//! for each latent, `config.json` (R1-Distill).
//!
//! With s = √d / mean‖x‖ of the hook's input and output, n the decoder's norms:
//!
//! ```text
//! Llama Scope    h = n (s_in E x + b) / s_out,  z = h where h > θ, one number
//!                by SAELens: u = s_in E x + b,  z = u where u > s_in θ       (reader saelens-compat)
//! R1-Distill     u = s E x + b,                 z = u where u > e^log_jumprelu_threshold
//! ```

use serde_json::Value;

use crate::error::{Result, bail};

use super::config::Config;
use super::found::{Found, LINEAR_DECODER, exp, repeated, scalar};
use super::source::Source;
use super::{Opened, SaeOptions, Site};

const AVERAGE: &str = "dataset_average_activation_norm";
const THETAS: &str = "log_jumprelu_threshold";

pub(super) fn matches(s: &Source<'_>) -> bool {
    is_linear(s) && s.beside("hyperparams.json").is_some()
}

pub(super) fn open(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("hyperparams.json")?;
    refuse_other_rules(&config, "act_fn", "jumprelu")?;
    let Some(threshold) = config.real("jump_relu_threshold")? else {
        return config.missing("jump_relu_threshold", "state the threshold of all latents");
    };
    let mut found = linear(s, "llama_scope")?;
    let root = (found.w_enc.inputs() as f64).sqrt();
    let average = |side: &str| match config.find(AVERAGE).and_then(|a| a.get(side)?.as_f64()) {
        Some(norm) if norm > 0.0 && norm.is_finite() => Ok(root / norm),
        _ => config.missing(AVERAGE, "state the mean norms as {\"in\": …, \"out\": …}"),
    };
    let (scale, output_scale) = (average("in")?, average("out")?);
    found.normalization = "dataset-wise";
    found.scale = scale;
    let include = config.flag("sparsity_include_decoder_norm")?;
    let threshold = match config.text("reader")?.unwrap_or("openmoss") {
        "openmoss" => {
            if include != Some(true) {
                return config.missing(
                    "sparsity_include_decoder_norm",
                    "only checkpoints that say true are known; give the reader saelens-compat for \
                     SAELens' rule",
                );
            }
            found.output_scale = output_scale;
            found.decoder_norm_folded = true;
            threshold
        }
        "saelens-compat" => {
            found.format = "llama_scope (saelens-compat)";
            threshold * scale
        }
        other => bail!(
            InvalidArgument,
            "{}: the key reader is {other}; known are openmoss (the authors' rule) and \
             saelens-compat",
            config.origin()
        ),
    };
    let latents = found.w_enc.latents();
    let mut found = found.jumprelu(repeated("jump_relu_threshold", threshold, latents));
    found.hook = config.text("hook_point_in")?.map(str::to_string);
    place_by_folder(&mut found, s);
    found.open(config)
}

pub(super) fn is_r1_distill(s: &Source<'_>) -> bool {
    is_linear(s) && s.container.has(THETAS)
}

pub(super) fn open_r1_distill(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("config.json")?;
    refuse_other_rules(&config, "act_fn", "jumprelu")?;
    if config.flag("sparsity_include_decoder_norm")?.unwrap_or(false) {
        bail!(
            Unsupported,
            "{}: the key sparsity_include_decoder_norm is true, which no R1-Distill checkpoint says",
            config.origin()
        );
    }
    let found = linear(s, "llama_scope_r1_distill")?;
    let mut found = found.jumprelu(exp(&s.container.need(THETAS)?)?);
    found.hook = config.text("hook_point_in")?.map(str::to_string);
    place_by_folder(&mut found, s);
    found.normalization = "dataset-wise";
    found.scale =
        dataset_scale(s, &config, found.hook.as_deref(), found.w_enc.inputs(), s.options)?;
    found.open(config)
}

/// Without a hook, by the folder: `Llama3_1-8B-Base-L15R-8x`, `L15R`.
fn place_by_folder(found: &mut Found, s: &Source<'_>) {
    if found.hook.is_some() {
        return;
    }
    let place = |folder: &str| {
        folder.split('-').find_map(|part| {
            let digits = part.strip_prefix('L')?;
            let letters = digits.trim_start_matches(|c: char| c.is_ascii_digit());
            let layer = digits[..digits.len() - letters.len()].parse::<u32>().ok()?;
            let site = match letters {
                "R" => Site::BlockOutput,
                "A" => Site::AttentionOutput,
                "M" => Site::MlpOutput,
                "TC" => Site::NormOutput,
                _ => return None,
            };
            Some((site, layer))
        })
    };
    if let Some((site, layer)) = s.folders().find_map(place) {
        (found.site, found.layer) = (site, Some(i64::from(layer)));
    }
}

/// √d / the mean norm that the file keeps for this hook, or that the caller knows.
pub(super) fn dataset_scale(
    s: &Source<'_>,
    config: &Config,
    hook: Option<&str>,
    d_in: usize,
    options: &SaeOptions,
) -> Result<f64> {
    if let Some(scale) = options.input_scale {
        return Ok(scale);
    }
    let stored = hook.map(|hook| s.container.find(&format!("{AVERAGE}.{hook}"))).transpose()?;
    let Some(norm) = stored.flatten() else {
        bail!(
            RecipeIncomplete,
            "{}: the key norm_activation is dataset-wise, but the mean norm of the input is not in \
             the checkpoint; give the option input_scale (--input-scale), sqrt(d_in)/mean|h|",
            config.origin()
        );
    };
    match scalar(&norm)? {
        value if value > 0.0 => Ok((d_in as f64).sqrt() / value),
        value => bail!(Format, "{} is {value}; it must be above 0", norm.label()),
    }
}

fn is_linear(s: &Source<'_>) -> bool {
    let c = &s.container;
    c.has("encoder.weight") && c.has("encoder.bias") && c.has("decoder.weight")
}

fn linear(s: &Source<'_>, format: &'static str) -> Result<Found> {
    let w_enc = s.linear("encoder.weight")?;
    let mut found = Found::standard(format, w_enc, s.container.need("encoder.bias")?);
    found.w_dec = s.decoder("decoder.weight", &found.w_enc, LINEAR_DECODER)?;
    found.b_dec = s.container.find("decoder.bias")?;
    Ok(found)
}

/// Keys of the same trainer that would change the formula.
fn refuse_other_rules(config: &Config, key: &str, known: &str) -> Result<()> {
    let mut wrong = None;
    if config.text(key)?.is_some_and(|name| name != known) {
        wrong = Some(key);
    }
    for flag in ["apply_decoder_bias_to_pre_encoder", "use_glu_encoder"] {
        if config.flag(flag)?.unwrap_or(false) {
            wrong = Some(flag);
        }
    }
    if config.text("norm_activation")?.is_some_and(|name| name != "dataset-wise") {
        wrong = Some("norm_activation");
    }
    match wrong {
        None => Ok(()),
        Some(key) => bail!(
            Unsupported,
            "{}: the key {key} is {}, which no published checkpoint of this format says",
            config.origin(),
            config.find(key).unwrap_or(&Value::Null)
        ),
    }
}
