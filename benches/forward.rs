//! Loss and coefficients.

use criterion::{Criterion, Throughput};
use half::bf16;

use crate::case::{COUNTS, Case, Real};

pub fn group(criterion: &mut Criterion) {
    for count in COUNTS {
        case::<f32>(criterion, count);
        case::<bf16>(criterion, count);
    }
}

fn case<H: Real>(criterion: &mut Criterion, count: usize) {
    let mut case = Case::<H>::new(count);
    let mut group = criterion.benchmark_group("forward");
    group.sample_size(10).throughput(Throughput::Bytes(case.bytes()));
    group.bench_function(case.name.clone(), |b| b.iter(|| case.forward()));
}
