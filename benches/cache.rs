//! A batch of references from a cache, beside encoding it again from hidden states (the base model's
//! forward pass, which the cache saves, comes on top of that) and beside copying it in memory.

use std::os::unix::fs::MetadataExt;

use blockem::cache::{Cache, CacheOptions, Key, Mode};
use blockem::latents::Latents;
use blockem::penalty::EncodeArgs;
use blockem::plan::{Plan, PlanOptions};
use blockem::sae::{Architecture, Layout, Sae, SaeTensors};
use blockem::tensor::{DType, Tensor, TensorMut};
use criterion::{BatchSize, Criterion, Throughput};
use half::bf16;

const BATCH: usize = 8;
const TOKENS: usize = 512;
const LATENTS: usize = 20;
const D_IN: usize = 2048;
/// 335 MB of z: more than the pages that an open cache keeps in memory.
const EXAMPLES: usize = 8192;

pub fn group(c: &mut Criterion) {
    let plan = plan();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reference.cache");
    let options = CacheOptions {
        mode: Mode::Create,
        base_model: Some("bench"),
        layer: Some(0),
        dtype: Some(DType::BF16),
        plan: Some(&plan),
        ..CacheOptions::default()
    };
    let cache = Cache::open(&path, &options).unwrap();
    let keys: Vec<Key> =
        (0..EXAMPLES as i64).map(|i| cache.example_key(&[i], None, &[]).unwrap()).collect();
    let mut z = vec![1.0f32; BATCH * TOKENS * LATENTS];
    for batch in keys.chunks(64) {
        let one = Tensor::from_slice(&z[..TOKENS * LATENTS], &[TOKENS, LATENTS]).unwrap();
        cache.put(&plan, batch, &vec![one; batch.len()]).unwrap();
    }
    // Not its length: a file that grows has holes.
    let used = std::fs::metadata(&path).unwrap().blocks() as f64 * 512.0;
    let held = (EXAMPLES * TOKENS * LATENTS * 4) as f64;
    println!("cache/file: {:.2} bytes on the disk for each byte of z", used / held);

    let mut group = c.benchmark_group("cache/B=8,T=512,K=20");
    group.throughput(Throughput::Bytes((z.len() * 4) as u64));
    let mut batches = keys.chunks(BATCH).cycle();
    group.bench_function("read", |b| {
        b.iter(|| {
            let mut views: Vec<TensorMut> = z
                .chunks_mut(TOKENS * LATENTS)
                .map(|z| TensorMut::from_slice(z, &[TOKENS, LATENTS]).unwrap())
                .collect();
            cache.get(&plan, batches.next().unwrap(), &mut views).unwrap();
        })
    });
    let source = z.clone();
    group.bench_function("copy in memory", |b| b.iter(|| z.copy_from_slice(&source)));
    let hidden = vec![bf16::from_f32(0.5); BATCH * TOKENS * D_IN];
    group.bench_function(format!("encode again, d={D_IN} bf16"), |b| {
        b.iter(|| {
            plan.encode(&mut EncodeArgs::new(
                Tensor::from_slice(&hidden, &[BATCH * TOKENS, D_IN]).unwrap(),
                TensorMut::from_slice(&mut z, &[BATCH * TOKENS, LATENTS]).unwrap(),
            ))
            .unwrap()
        })
    });
    // Each transaction waits for the disk.
    let mut next = EXAMPLES as i64..;
    group.sample_size(20);
    group.bench_function("store", |b| {
        b.iter_batched(
            || {
                let ids = next.by_ref().take(BATCH);
                ids.map(|i| cache.example_key(&[i], None, &[]).unwrap()).collect::<Vec<Key>>()
            },
            |keys| {
                let one = Tensor::from_slice(&source[..TOKENS * LATENTS], &[TOKENS, LATENTS]);
                cache.put(&plan, &keys, &vec![one.unwrap(); BATCH]).unwrap()
            },
            BatchSize::PerIteration,
        )
    });
    group.finish();
}

fn plan() -> Plan {
    let weight: Vec<f32> = (0..LATENTS * D_IN).map(|i| (i * 7 % 13) as f32 * 0.01 - 0.06).collect();
    let bias = [0.0; LATENTS];
    let encoder = Tensor::from_slice(&weight, &[LATENTS, D_IN]).unwrap();
    let mut tensors = SaeTensors::new(Architecture::Standard, D_IN, LATENTS, encoder);
    tensors.encoder_layout = Some(Layout::LatentMajor);
    tensors.encoder_bias = Some(Tensor::from_slice(&bias, &[LATENTS]).unwrap());
    let ids: Vec<i64> = (0..LATENTS as i64).collect();
    let latents = Latents::new(&ids, &[1; LATENTS], None).unwrap();
    Plan::new(&Sae::from_tensors(&tensors).unwrap(), &latents, &PlanOptions::default()).unwrap()
}
