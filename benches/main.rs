//! Criterion groups of the run calls: `cargo bench`, or `cargo bench -- fused/f32` for one.
//!
//! Throughput counts the bytes of hidden, which every call but backward reads once.

mod backward;
mod case;
mod encode;
mod forward;
mod fused;

criterion::criterion_group!(benches, encode::group, forward::group, backward::group, fused::group);
criterion::criterion_main!(benches);
