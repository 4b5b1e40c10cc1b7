//! OpenMOSS as it is now (llamascopium): `config.json` and `sae_weights.safetensors`.
//!
//! The owner's `SparseAutoEncoder.encode` (llamascopium/models/sae.py). With s = √d / mean‖x‖ (kept in the file), √d / ‖x‖ (token-wise) or 1, n the decoder's norms if
//! `sparsity_include_decoder_norm`, else 1:
//!
//! ```text
//! u = s x W_E + b_E,    with use_glu_encoder times sigmoid(s x W_E_glu + b_E_glu)
//! relu: z = relu(u),    jumprelu: z = u where n u > e^log_jumprelu_threshold
//! topk: z = u where n u is above 0 and one of the token's k largest; batchtopk: of the batch's k T
//! ```
//!
//! Files that say `inference` had s folded by the owner, into b_E and W_D alone. Their sigmoid then
//! sees x without s, here as there.

use crate::error::{Result, bail};

use super::array::Layout;
use super::checkpoint::GluArrays;
use super::config::Config;
use super::found::{Found, exp};
use super::llama_scope::dataset_scale;
use super::source::Source;
use super::{Opened, Selection, TokenNorm};

const THETAS: &str = "activation_function.log_jumprelu_threshold";

pub(super) fn matches(s: &Source<'_>) -> bool {
    s.container.has("W_E") && s.container.has("b_E")
}

pub(super) fn open(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("config.json")?;
    let b_enc = s.container.need("b_E")?;
    let w_enc = s.oriented("W_E", &b_enc, Some(Layout::InputMajor))?;
    let mut found = Found::standard("openmoss", w_enc, b_enc);
    found.glu = glu(s, &config)?;
    found.w_dec = s.same_width_decoder("W_D", &found.w_enc, Layout::LatentMajor)?;
    found.b_dec = s.container.find("b_D")?;
    found.hook = config.text("hook_point_in")?.map(str::to_string);
    match config.text("norm_activation")? {
        Some("inference") => {}
        Some("token-wise") => found = found.normalized(TokenNorm::Constant, "token-wise"),
        Some("dataset-wise") => {
            found.normalization = "dataset-wise";
            let hook = found.hook.as_deref();
            found.scale = dataset_scale(s, &config, hook, found.w_enc.inputs(), s.options)?;
        }
        Some(other) => {
            let text = format!("norm_activation is {other}: the factor depends on the batch");
            return unsupported(&config, &text);
        }
        None => {
            return config
                .missing("norm_activation", "state token-wise, dataset-wise or inference");
        }
    }
    let Some(on_norm) = config.flag("sparsity_include_decoder_norm")? else {
        return config.missing(
            "sparsity_include_decoder_norm",
            "state whether thresholds are for pre-activations times the decoder's norms",
        );
    };
    match config.text("act_fn")? {
        Some("relu") => {}
        Some("jumprelu") => {
            found = found.jumprelu(exp(&s.container.need(THETAS)?)?);
            found.threshold_on_decoder_norm = on_norm;
        }
        Some(act_fn @ ("topk" | "batchtopk")) => {
            let Some(k) = config.count("top_k")? else {
                return config.missing("top_k", "state the number of active latents");
            };
            let selection = if act_fn == "topk" { Selection::Largest } else { Selection::Batch };
            found = found.topk(k, selection, config.origin())?;
            found.threshold_on_decoder_norm = on_norm;
        }
        Some(other) => {
            let text = format!(
                "act_fn is {other}; relu, jumprelu, topk and batchtopk are read: save it as jumprelu"
            );
            return unsupported(&config, &text);
        }
        None => return config.missing("act_fn", "state relu, jumprelu, topk or batchtopk"),
    }
    if found.threshold_on_decoder_norm && found.w_dec.is_none() {
        s.container.need("W_D")?;
    }
    found.open(config)
}

/// The second encoder, where there is one.
fn glu(s: &Source<'_>, config: &Config) -> Result<Option<GluArrays>> {
    match (config.flag("use_glu_encoder")?.unwrap_or(false), s.container.has("W_E_glu")) {
        (false, false) => Ok(None),
        (false, true) => bail!(
            Format,
            "{}: the key use_glu_encoder is not true, but the checkpoint holds W_E_glu, which gates \
             the encoder; correct the key",
            config.origin()
        ),
        (true, _) => {
            let b_enc = s.container.need("b_E_glu")?;
            let w_enc = s.oriented("W_E_glu", &b_enc, Some(Layout::InputMajor))?;
            Ok(Some(GluArrays { w_enc, b_enc }))
        }
    }
}

fn unsupported<T>(config: &Config, text: &str) -> Result<T> {
    bail!(Unsupported, "{}: the key {text}, which this version does not compute", config.origin())
}
