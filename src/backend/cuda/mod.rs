//! The CUDA backend.

#![allow(dead_code)]

mod launch;
#[cfg(test)]
mod tests;
