//! The fuzzers of the readers: what one input does ([`targets`]), what it may cost ([`bounds`]), and
//! how inputs are changed so that they stay files that a reader looks into ([`mutate`]).
//!
//! tests/fuzz_corpus.rs includes the files without the mutators and replays the committed corpus.

pub mod archive;
pub mod bounds;
pub mod caches;
pub mod mutate;
pub mod targets;

#[global_allocator]
static ALLOCATOR: bounds::Counting = bounds::Counting;
