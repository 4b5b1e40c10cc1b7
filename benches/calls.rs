//! The run calls, a group each: z of every token; loss and coefficients; dH, written fresh from saved
//! coefficients; all in one pass over hidden.

use criterion::{Criterion, Throughput};
use half::bf16;

use crate::case::{COUNTS, Case, Real};

macro_rules! groups {
    ($($name:ident),*) => { $(
        pub fn $name(criterion: &mut Criterion) {
            for count in COUNTS {
                case::<f32>(criterion, stringify!($name), count, |case| case.$name());
                case::<bf16>(criterion, stringify!($name), count, |case| case.$name());
            }
        }
    )* };
}
groups!(encode, forward, backward, fused);

fn case<H: Real>(criterion: &mut Criterion, name: &str, count: usize, call: fn(&mut Case<H>)) {
    let mut case = Case::<H>::new(count);
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).throughput(Throughput::Bytes(case.bytes()));
    group.bench_function(case.name.clone(), |b| b.iter(|| call(&mut case)));
}
