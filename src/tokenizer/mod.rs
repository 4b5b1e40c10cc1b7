//! Text to token ids with a mask of the assistant's tokens ([`crate::mask`]), by the tokenizers
//! crate; without the feature `tokenizers` every call is refused.

#[cfg(not(feature = "tokenizers"))]
#[path = "absent.rs"]
mod implementation;
#[cfg(feature = "tokenizers")]
#[path = "present.rs"]
mod implementation;

pub use implementation::Tokenizer;

/// What tokens are made of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenOptions {
    /// Adds what the tokenizer puts around a text, such as BOS. A chat template writes its own.
    pub add_special_tokens: bool,
    /// Keeps so many tokens from the beginning, the added ones among them.
    pub max_tokens: Option<usize>,
}

/// The tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masked {
    pub ids: Vec<i64>,
    /// One for each token: 1 where it is the assistant's.
    pub mask: Vec<u8>,
}
