//! BLOCK-EM's latent penalty and its gradient, for any trainer.
//!
//! The penalty is a pure function of arrays ([`penalty`]); everything else prepares its inputs:
//! [`sae`] reads dictionaries, [`latents`] holds the blocked sets, [`plan`] joins the two on a
//! device, [`mask`] and [`tokenizer`] tell which tokens count. Only the C ABI
//! (`include/blockem.h`, generated from [`capi`]) is promised stable.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod backend;
pub mod cache;
pub mod capi;
mod dictionary;
pub mod error;
pub mod json;
pub mod latents;
pub mod mask;
mod output;
pub mod penalty;
pub mod penalty_file;
pub mod plan;
pub mod sae;
pub mod stats;
pub mod steer;
pub mod tensor;
pub mod tokenizer;
pub mod verify;
mod xla;
