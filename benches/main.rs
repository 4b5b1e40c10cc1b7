//! Criterion groups of the run calls, the reference cache and loading: `cargo bench`, or `cargo bench -- fused/f32` for one.
//!
//! Throughput counts the bytes of hidden, which every call but backward reads once.

mod cache;
mod calls;
mod case;
mod load;

criterion::criterion_group!(
    benches,
    calls::encode,
    calls::forward,
    calls::backward,
    calls::fused,
    cache::group,
    load::group
);
criterion::criterion_main!(benches);
