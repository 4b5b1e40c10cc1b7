//! Goodfire: a state dict of two linear layers (Llama), or one tied matrix (R1).
//!
//! Llama: z = relu(E · x + b). Its layer is in the file's name alone (`…-l19.pth`): the output of
//! that block. R1: relu(W' · x + b_enc), of which the owner keeps the k · T largest of a batch.

use crate::error::Result;

use super::array::Layout;
use super::found::{Found, LINEAR_DECODER};
use super::source::Source;
use super::{Opened, Selection, Site};

pub(super) fn is_llama(s: &Source<'_>) -> bool {
    s.container.has("encoder_linear.weight")
}

pub(super) fn open_llama(s: &Source<'_>) -> Result<Opened> {
    let w_enc = s.linear("encoder_linear.weight")?;
    let b_enc = s.container.need("encoder_linear.bias")?;
    let mut found = Found::standard("goodfire", w_enc, b_enc).at_block(s.layer_in_path(&["l"]));
    found.w_dec = s.decoder("decoder_linear.weight", &found.w_enc, LINEAR_DECODER)?;
    found.b_dec = s.container.find("decoder_linear.bias")?;
    found.open(s.options_config())
}

pub(super) fn is_r1(s: &Source<'_>) -> bool {
    s.container.has("W") && s.container.has("b_enc")
}

pub(super) fn open_r1(s: &Source<'_>) -> Result<Opened> {
    let config = s.config_or_options("config.json")?;
    let b_enc = s.container.need("b_enc")?;
    let w_enc = s.oriented("W", &b_enc, Some(Layout::InputMajor))?;
    let k = match config.count("k")? {
        Some(k) => k,
        None => {
            return config.missing("k", "state the mean number of active latents for each token");
        }
    };
    let mut found =
        Found::standard("goodfire_r1", w_enc, b_enc).topk(k, Selection::Batch, config.origin())?;
    found.b_dec = s.container.find("b_dec")?;
    found.at(Site::BlockOutput, s.layer_in_path(&["l"])).open(config)
}
