//! A build without the feature `tokenizers`: there is no tokenizer to be had.

use std::convert::Infallible;
use std::path::Path;

use super::{Masked, TokenOptions};
use crate::error::{Result, bail};
use crate::mask::MaskOptions;

pub struct Tokenizer(Infallible);

impl Tokenizer {
    pub fn open(_: impl AsRef<Path>) -> Result<Tokenizer> {
        Tokenizer::from_json(&[])
    }

    pub fn from_json(_: &[u8]) -> Result<Tokenizer> {
        bail!(
            Unsupported,
            "this libblockem reads no tokenizers: build it with the cargo feature `tokenizers`, or \
             use another tokenizer's offsets (mask_from_offsets)"
        )
    }

    pub fn mask(&self, _: &str, _: &MaskOptions, _: TokenOptions) -> Result<Masked> {
        match self.0 {}
    }

    pub fn mask_ids(
        &self,
        _: &str,
        _: &MaskOptions,
        _: TokenOptions,
        _: &[i64],
    ) -> Result<Vec<u8>> {
        match self.0 {}
    }
}
