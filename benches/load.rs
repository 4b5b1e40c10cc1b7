//! Opening an SAE and gathering 20 latents of it, with the file in the page cache. The 2 GiB
//! dictionary beside sae-lens is benches/load.py.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use blockem::sae::{Sae, SaeOptions};
use criterion::{Criterion, Throughput};

const D: usize = 1024;
const F: usize = 16_384;
const K: u64 = 20;

pub fn group(c: &mut Criterion) {
    let ids: Vec<u64> = (0..K).map(|i| (i * 3271 + 17) % F as u64).collect();
    let mut group = c.benchmark_group("load");
    group.throughput(Throughput::Bytes(K * D as u64 * 4));
    // SAELens' own layout, whose columns are scattered, and the one that `blockem convert` writes.
    let folder = saelens_folder();
    let converted = folder.join("converted.safetensors");
    open(&folder).convert(None, &converted, &mut |_, _| {}).expect("cannot convert the SAE");
    for (name, path) in [("input_major", &folder), ("latent_major", &converted)] {
        group.bench_function(format!("open/{name}"), |b| b.iter(|| open(path)));
        let sae = open(path);
        group.bench_function(format!("gather/{name}"), |b| {
            b.iter(|| sae.gather(&ids).expect("cannot gather"))
        });
    }
    group.finish();
}

fn open(path: &Path) -> Sae {
    Sae::open(path, &SaeOptions::default()).expect("cannot open the SAE")
}

/// 64 MiB of encoder in the layout of SAELens.
fn saelens_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("load");
    fs::create_dir_all(&folder).expect("cannot make the folder");
    let sizes = [("W_enc", vec![D, F]), ("b_enc", vec![F]), ("b_dec", vec![D])];
    let mut end = 0;
    let mut entries = Vec::new();
    for (name, shape) in sizes {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        entries.push(format!(
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let values: Vec<u8> = (0..end / 4).flat_map(|i| (i as f32 * 0.7).sin().to_le_bytes()).collect();
    let weights = fs::File::create(folder.join("sae_weights.safetensors"));
    let mut weights = weights.expect("cannot make the weights");
    for part in [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &values] {
        weights.write_all(part).expect("cannot write the weights");
    }
    fs::write(folder.join("cfg.json"), r#"{"architecture": "standard"}"#)
        .expect("cannot write the configuration");
    folder
}
