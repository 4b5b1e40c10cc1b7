//! Reference caches: the same bits as encoding again, and what a kill, a damaged file, a full disk
//! and a second process do to one.

#![cfg(unix)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blockem::cache::{Cache, CacheOptions, Counts, Key, Mode};
use blockem::error::{Result, Status};
use blockem::latents::Latents;
use blockem::penalty::EncodeArgs;
use blockem::plan::{Activation, BackendKind, Plan, PlanOptions};
use blockem::sae::{Architecture, Layout, Sae, SaeTensors, Site};
use blockem::tensor::{DType, Tensor, TensorMut};
use support::{RandomSae, Rng};
use tempfile::TempDir;

const D: usize = 24;
const BASE: &str = "base model, revision 1";

/// A plan of these latents of a fixed SAE.
fn plan(ids: &[i64]) -> Plan {
    plan_of(5, ids, BackendKind::Cpu, Activation::Native)
}

fn plan_of(seed: u64, ids: &[i64], backend: BackendKind, activation: Activation) -> Plan {
    let sae = RandomSae::new(&mut Rng::of(seed), Architecture::JumpRelu, D, 64);
    let signs = vec![1; ids.len()];
    let set = Latents::new(ids, &signs, None).unwrap();
    let options = PlanOptions { backend, activation, num_threads: 1, ..PlanOptions::default() };
    Plan::new(&sae.open(), &set, &options).unwrap()
}

/// Token ids and hidden states of example i, as a base model would give them: always the same.
fn example(i: usize) -> (Vec<i64>, Vec<f32>) {
    let mut rng = Rng::of(1000 + i as u64);
    let tokens = 1 + rng.below(90);
    let ids = (0..tokens).map(|_| rng.below(50_000) as i64).collect();
    (ids, rng.normals(tokens * D))
}

fn encode(plan: &Plan, hidden: &[f32]) -> Vec<f32> {
    let tokens = hidden.len() / D;
    let mut z = vec![0.0f32; tokens * plan.num_latents()];
    plan.encode(&mut EncodeArgs::new(
        Tensor::from_slice(hidden, &[tokens, D]).unwrap(),
        TensorMut::from_slice(&mut z, &[tokens, plan.num_latents()]).unwrap(),
    ))
    .unwrap();
    z
}

fn open(path: &Path, mode: Mode, plan: &Plan) -> Result<Cache> {
    Cache::open(
        path,
        &CacheOptions {
            mode,
            base_model: Some(BASE),
            layer: Some(19),
            dtype: Some(DType::F32),
            plan: Some(plan),
            ..CacheOptions::default()
        },
    )
}

fn key(cache: &Cache, i: usize) -> Key {
    cache.example_key(&example(i).0, None, &[]).unwrap()
}

/// Encodes and stores these examples, in one transaction.
fn put(cache: &Cache, plan: &Plan, examples: &[usize]) -> Result<u64> {
    let keys: Vec<Key> = examples.iter().map(|i| key(cache, *i)).collect();
    let z: Vec<Vec<f32>> = examples.iter().map(|i| encode(plan, &example(*i).1)).collect();
    let shape = |z: &[f32]| [z.len() / plan.num_latents(), plan.num_latents()];
    let z: Vec<Tensor> = z.iter().map(|z| Tensor::from_slice(z, &shape(z)).unwrap()).collect();
    cache.put(plan, &keys, &z)
}

fn get(cache: &Cache, plan: &Plan, i: usize) -> Result<Vec<f32>> {
    let (ids, _) = example(i);
    let mut z = vec![f32::NAN; ids.len() * plan.num_latents()];
    let view = TensorMut::from_slice(&mut z, &[ids.len(), plan.num_latents()]).unwrap();
    cache.get(plan, &[cache.example_key(&ids, None, &[]).unwrap()], &mut [view])?;
    Ok(z)
}

/// z that is read has the bits of z that is computed.
fn assert_holds(cache: &Cache, plan: &Plan, i: usize) {
    let z = get(cache, plan, i).unwrap_or_else(|e| panic!("example {i}: {e}"));
    assert!(same_bits(&z, &encode(plan, &example(i).1)), "example {i} has other bits");
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn folder() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("reference.cache");
    (folder, path)
}

fn refused<T>(outcome: Result<T>, status: Status, words: &[&str]) {
    let error = outcome.err().unwrap_or_else(|| panic!("accepted; expected {status:?}"));
    assert_eq!(error.status, status, "{error}");
    for word in words {
        assert!(error.message.contains(word), "{word:?} is not in: {error}");
    }
}

mod contents {
    use super::*;

    #[test]
    fn have_the_bits_of_encoding_again() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17, 21, 5]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        assert_eq!(put(&cache, &plan, &[0, 1, 2]).unwrap(), 12);
        for i in 0..3 {
            assert_holds(&cache, &plan, i);
        }
        drop(cache);
        let cache = open(&path, Mode::Read, &plan).unwrap();
        for i in 0..3 {
            assert_holds(&cache, &plan, i);
        }
        assert_eq!(cache.counts().unwrap(), Counts { examples: 3, columns: 4 });
    }

    #[test]
    fn of_a_batch_are_read_through_strides() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        put(&cache, &plan, &[0, 1]).unwrap();
        let tokens: Vec<usize> = (0..2).map(|i| example(i).0.len()).collect();
        let width = tokens.iter().max().unwrap() + 3;
        // [K, B, width]: a column of an example is dense, its row is not.
        let mut batch = vec![-1.0f32; 2 * 2 * width];
        let keys = [key(&cache, 0), key(&cache, 1)];
        let mut views: Vec<TensorMut> = (0..2)
            .map(|i| {
                let at = batch[i * width..].as_mut_ptr().cast();
                let (shape, stride) = ([tokens[i], 2], [1, 2 * width]);
                // SAFETY: token t of column k of example i is at (k * 2 + i) * width + t.
                unsafe {
                    TensorMut::from_raw(
                        at,
                        DType::F32,
                        blockem::tensor::Device::Cpu,
                        &shape,
                        &stride,
                    )
                }
                .unwrap()
            })
            .collect();
        cache.get(&plan, &keys, &mut views).unwrap();
        for i in 0..2 {
            let expected = encode(&plan, &example(i).1);
            for k in 0..2 {
                for t in 0..width {
                    let z = batch[(k * 2 + i) * width + t];
                    let want = if t < tokens[i] { expected[t * 2 + k] } else { -1.0 };
                    assert_eq!(z.to_bits(), want.to_bits(), "example {i}, token {t}, column {k}");
                }
            }
        }
    }

    #[test]
    fn grow_by_the_columns_that_are_new() {
        let (_folder, path) = folder();
        let (first, more) = (plan(&[3, 17]), plan(&[40, 17, 3, 2, 63]));
        let cache = open(&path, Mode::Create, &first).unwrap();
        put(&cache, &first, &[0, 1]).unwrap();
        let keys = [key(&cache, 0), key(&cache, 2)];
        let missing = cache.missing(&more, &keys).unwrap();
        assert_eq!(missing[..5], [true, false, false, true, true]);
        assert_eq!(missing[5..], [true; 5]);
        refused(get(&cache, &more, 0), Status::CacheMiss, &["40, 2, 63", "lacks"]);

        assert_eq!(put(&cache, &more, &[0, 1]).unwrap(), 6, "only the new columns are written");
        for i in 0..2 {
            assert_holds(&cache, &more, i);
            assert_holds(&cache, &first, i);
        }
        assert_eq!(cache.counts().unwrap(), Counts { examples: 2, columns: 5 });
    }

    #[test]
    fn are_written_once() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        put(&cache, &plan, &[0]).unwrap();
        let other = vec![7.0f32; example(0).0.len() * 2];
        let view = Tensor::from_slice(&other, &[other.len() / 2, 2]).unwrap();
        assert_eq!(cache.put(&plan, &[key(&cache, 0)], &[view]).unwrap(), 0);
        assert_holds(&cache, &plan, 0);
    }

    #[test]
    fn stay_apart_by_tokens_and_positions() {
        let (_folder, path) = folder();
        let plan = plan(&[3]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        let key = |ids: &[i64], positions: Option<&[i64]>| cache.example_key(ids, positions, &[]);
        let plain = key(&[5, 6, 7], None).unwrap();
        assert_eq!(plain, key(&[5, 6, 7], Some(&[0, 1, 2])).unwrap());
        let others = [
            key(&[5, 6], None).unwrap(),
            key(&[5, 7, 6], None).unwrap(),
            key(&[5, 6, 7, 0], None).unwrap(),
            key(&[5, 6, 7], Some(&[1, 2, 3])).unwrap(),
        ];
        for other in others {
            assert_ne!(plain, other);
        }
        refused(key(&[], None), Status::InvalidArgument, &["at least one token"]);
        refused(key(&[1, 2], Some(&[0])), Status::Shape, &["2 token ids and 1 positions"]);

        let elsewhere = folder();
        let options = CacheOptions {
            mode: Mode::Create,
            base_model: Some("another"),
            layer: Some(19),
            dtype: Some(DType::F32),
            plan: Some(&plan),
            ..CacheOptions::default()
        };
        let other = Cache::open(&elsewhere.1, &options).unwrap();
        assert_ne!(plain, other.example_key(&[5, 6, 7], None, &[]).unwrap());
    }

    #[test]
    fn stay_apart_by_what_else_the_model_saw() {
        let (_folder, path) = folder();
        let plan = plan(&[3]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        let key = |ids: &[i64], context: &[u8]| cache.example_key(ids, None, context).unwrap();
        let images = [vec![0u8; 4096], [vec![0; 4095], vec![1]].concat(), vec![0; 4095]];
        let mut keys: Vec<Key> = images.iter().map(|image| key(&[5, 6], image)).collect();
        assert_eq!(keys[1], key(&[5, 6], &images[1]));
        keys.extend([key(&[5, 6], &[]), key(&[5, 7], &images[0]), key(&[5, 7], &[])]);
        for (i, one) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(one), "example {i} has the key of another");
            let z = Tensor::from_slice(&[0.5f32, 0.25], &[2, 1]).unwrap();
            if i != 1 {
                assert_eq!(cache.put(&plan, &[*one], &[z]).unwrap(), 1);
            }
        }
        let mut z = [0.0f32; 2];
        let mut get = |key| {
            let view = TensorMut::from_slice(&mut z, &[2, 1]).unwrap();
            cache.get(&plan, &[key], &mut [view])
        };
        get(keys[0]).unwrap();
        refused(get(keys[1]), Status::CacheMiss, &["another context", "images"]);
        refused(get(key(&[5, 8], &[])), Status::CacheMiss, &["token ids or positions"]);
    }

    #[test]
    fn have_notes_beside_them_that_are_written_once() {
        let (_folder, path) = folder();
        let plan = plan(&[3]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        assert_eq!(cache.note("placeholders").unwrap(), None);
        cache.put_note("placeholders", "{\"image\": 60}").unwrap();
        cache.put_note("identity", "of its own").unwrap();
        cache.put_note("placeholders", "{\"image\": 60}").unwrap();
        let words = ["reference.cache", "note 'placeholders'", "60", "61"];
        refused(cache.put_note("placeholders", "{\"image\": 61}"), Status::CacheStale, &words);
        for (name, text) in [("", "x"), (&"n".repeat(256), "x"), ("n", "")] {
            refused(cache.put_note(name, text), Status::InvalidArgument, &["bytes"]);
        }
        let long = "x".repeat(65537);
        refused(cache.put_note("n", &long), Status::InvalidArgument, &["65537"]);
        cache.put_note("n", &long[1..]).unwrap();
        drop(cache);
        let cache = open(&path, Mode::Read, &plan).unwrap();
        assert_eq!(cache.note("placeholders").unwrap().unwrap(), "{\"image\": 60}");
        cache.put_note("placeholders", "{\"image\": 60}").unwrap();
        refused(cache.put_note("more", "x"), Status::InvalidArgument, &["opened for reading"]);
        assert_eq!(cache.counts().unwrap(), Counts { examples: 0, columns: 0 });
    }

    #[test]
    fn must_fit() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        put(&cache, &plan, &[0]).unwrap();
        let key = key(&cache, 0);
        let tokens = example(0).0.len();
        let put = |z: &[f32], shape: &[usize]| {
            cache.put(&plan, &[key], &[Tensor::from_slice(z, shape).unwrap()])
        };
        refused(put(&[0.0; 6], &[2, 3]), Status::Shape, &["[T, 2]"]);
        refused(put(&[0.0; 6], &[6]), Status::Shape, &["[T, 2]"]);
        refused(put(&[], &[0, 2]), Status::Shape, &["no tokens"]);
        let longer = vec![0.0; 2 * tokens + 2];
        refused(put(&longer, &[tokens + 1, 2]), Status::Shape, &["in the cache"]);
        refused(put(&[0.0, f32::NAN], &[1, 2]), Status::NonFinite, &["column 1"]);
        refused(put(&[f32::INFINITY, 0.0], &[1, 2]), Status::NonFinite, &["token 0"]);
        refused(cache.put(&plan, &[key], &[]), Status::Shape, &["1 keys and 0"]);
        let wide = [0.0f64; 2];
        let wide = Tensor::from_slice(&wide, &[1, 2]).unwrap();
        refused(cache.put(&plan, &[key], &[wide]), Status::Dtype, &["float64"]);

        let mut z = vec![5.0f32; 2 * (tokens + 1)];
        let view = TensorMut::from_slice(&mut z, &[tokens + 1, 2]).unwrap();
        refused(cache.get(&plan, &[key], &mut [view]), Status::Shape, &["in the cache"]);
        assert!(z.iter().all(|z| *z == 5.0), "written to in spite of the error");
    }

    #[test]
    fn of_a_batch_come_all_or_not_at_all() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        put(&cache, &plan, &[0]).unwrap();
        let (mut a, mut b) = (vec![5.0f32; 2 * example(0).0.len()], vec![5.0f32; 4]);
        let shape = [a.len() / 2, 2];
        let mut views = [
            TensorMut::from_slice(&mut a, &shape).unwrap(),
            TensorMut::from_slice(&mut b, &[2, 2]).unwrap(),
        ];
        let keys = [key(&cache, 0), [9; 32]];
        let words = ["example 1", "key 0909", "not in the cache", "1 of the 2", "1 are stored"];
        refused(cache.get(&plan, &keys, &mut views), Status::CacheMiss, &words);
        assert!(a.iter().all(|z| *z == 5.0), "written to in spite of the error");
    }
}

mod identity {
    use super::*;

    #[test]
    fn another_one_is_refused_with_both_sides() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        drop(open(&path, Mode::Create, &plan).unwrap());
        let expect = |options: CacheOptions| {
            for mode in [Mode::Read, Mode::Write, Mode::Create] {
                let opened = Cache::open(&path, &CacheOptions { mode, ..options });
                let Err(error) = opened else { panic!("{mode:?} accepted it") };
                assert_eq!(error.status, Status::CacheStale, "{error}");
                assert!(error.message.contains("reference.cache"), "{error}");
                let sides = error.message.split('\'').skip(1).step_by(2);
                assert_eq!(sides.count(), 2, "both sides in: {error}");
            }
        };
        let none = CacheOptions::default();
        expect(CacheOptions { base_model: Some("revision 2"), ..none });
        expect(CacheOptions { layer: Some(20), ..none });
        expect(CacheOptions { site: Site::MlpOutput, ..none });
        expect(CacheOptions { dtype: Some(DType::BF16), ..none });
        let oracle = plan_of(5, &[3, 17], BackendKind::Reference, Activation::Native);
        expect(CacheOptions { plan: Some(&oracle), ..none });

        let cache = Cache::open(&path, &none).unwrap();
        assert_eq!(cache.identity().base_model, BASE);
        assert_eq!((cache.identity().layer, cache.identity().dtype), (Some(19), DType::F32));
        assert_eq!(cache.identity().site, Site::BlockOutput);
        assert_eq!(cache.identity().numerics, plan.numerics());
        refused(get(&cache, &oracle, 0), Status::CacheStale, &["reference-1", "numerics"]);
    }

    #[test]
    fn another_sae_or_activation_is_refused_when_reading() {
        let (_folder, path) = folder();
        let made_for = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &made_for).unwrap();
        refused(get(&cache, &made_for, 0), Status::CacheMiss, &["0 are stored"]);
        put(&cache, &made_for, &[0]).unwrap();
        drop(cache);
        let others = [
            plan_of(6, &[3, 17], BackendKind::Cpu, Activation::Native),
            plan_of(5, &[3, 17], BackendKind::Cpu, Activation::DenseRelu),
        ];
        for other in others {
            refused(open(&path, Mode::Read, &other), Status::CacheStale, &["another SAE"]);
            let cache = open(&path, Mode::Write, &other).unwrap();
            refused(get(&cache, &other, 0), Status::CacheStale, &["another SAE"]);
        }
    }

    /// A plan whose SAE says where it reads.
    fn plan_at(hook: &str) -> Plan {
        let (encoder, bias) = ([0.5f32; 16], [0.0f32; 8]);
        let view = Tensor::from_slice(&encoder, &[8, 2]).unwrap();
        let mut tensors = SaeTensors::new(Architecture::Standard, 2, 8, view);
        tensors.encoder_layout = Some(Layout::LatentMajor);
        tensors.encoder_bias = Some(Tensor::from_slice(&bias, &[8]).unwrap());
        tensors.hook_name = Some(hook.into());
        let set = Latents::new(&[3], &[1], None).unwrap();
        Plan::new(&Sae::from_tensors(&tensors).unwrap(), &set, &PlanOptions::default()).unwrap()
    }

    #[test]
    fn has_the_site_that_the_sae_reads() {
        let folder = TempDir::new().unwrap();
        let open = |hook: &str, site, layer, mode| {
            let plan = plan_at(hook);
            let options = CacheOptions {
                mode,
                base_model: Some(BASE),
                dtype: Some(DType::F32),
                plan: Some(&plan),
                site,
                layer,
            };
            Cache::open(folder.path().join(format!("{hook}.cache")), &options)
        };
        let plain = |hook| open(hook, Site::Unknown, None, Mode::Create);
        let mut keys = Vec::new();
        for (hook, site, layer) in [
            ("blocks.3.hook_mlp_out", Site::MlpOutput, Some(3)),
            ("blocks.3.hook_resid_post", Site::BlockOutput, Some(3)),
            ("blocks.3.hook_resid_pre", Site::BlockOutput, Some(2)),
            ("blocks.0.hook_resid_pre", Site::Embedding, None),
            ("blocks.3.attn.hook_z", Site::AttentionZ, Some(3)),
        ] {
            let cache = plain(hook).unwrap();
            assert_eq!((cache.identity().site, cache.identity().layer), (site, layer), "{hook}");
            keys.push(cache.example_key(&[5, 6], None, &[]).unwrap());
            refused(cache.missing(&plan_at("blocks.5.hook_mlp_out"), &[]), Status::CacheStale, &[]);
            drop(cache);
            let (read, other) = (plain(hook).unwrap(), Site::AttentionOutput);
            assert_eq!(read.identity().site, site);
            drop(read);
            refused(open(hook, other, None, Mode::Read), Status::InvalidArgument, &["site is"]);
        }
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 5, "sites share keys");

        let unheard = "blocks.4.hook_unheard";
        refused(plain(unheard), Status::InvalidArgument, &["'blocks.4.hook_unheard'", "site"]);
        let stated = open(unheard, Site::MlpOutput, Some(4), Mode::Create).unwrap();
        assert_eq!((stated.identity().site, stated.identity().layer), (Site::MlpOutput, Some(4)));
        let input = open("blocks.4.hook_odd", Site::BlockInput, Some(4), Mode::Create);
        refused(input, Status::InvalidArgument, &["block_output of the block before"]);
        let nowhere = open("blocks.4.hook_odd", Site::Embedding, Some(4), Mode::Create);
        refused(nowhere, Status::InvalidArgument, &["embedding is of no block"]);
    }

    #[test]
    fn a_new_cache_needs_all_of_it() {
        let (_folder, path) = folder();
        let plan = plan(&[3]);
        let whole = CacheOptions {
            mode: Mode::Create,
            base_model: Some(BASE),
            layer: Some(1),
            dtype: Some(DType::F16),
            plan: Some(&plan),
            ..CacheOptions::default()
        };
        let long = "x".repeat(256);
        let lacks = |options: CacheOptions, word| {
            refused(Cache::open(&path, &options), Status::InvalidArgument, &[word]);
            assert!(!path.exists());
        };
        lacks(CacheOptions { base_model: None, ..whole }, "base_model");
        lacks(CacheOptions { base_model: Some(""), ..whole }, "base_model");
        lacks(CacheOptions { base_model: Some(&long), ..whole }, "256 bytes");
        lacks(CacheOptions { layer: None, ..whole }, "layer");
        lacks(CacheOptions { layer: Some(-1), ..whole }, "layer");
        lacks(CacheOptions { dtype: None, ..whole }, "dtype");
        lacks(CacheOptions { plan: None, ..whole }, "plan");
        let flags = CacheOptions { dtype: Some(DType::Bool), ..whole };
        refused(Cache::open(&path, &flags), Status::Dtype, &["bool"]);
        Cache::open(&path, &whole).unwrap();
    }

    #[test]
    fn other_files_are_told() {
        let (folder, path) = folder();
        let plan = plan(&[3]);
        for mode in [Mode::Read, Mode::Write] {
            refused(open(&path, mode, &plan), Status::Io, &["reference.cache"]);
            refused(open(folder.path(), mode, &plan), Status::Io, &[]);
        }
        let nowhere = folder.path().join("no").join("where");
        refused(open(&nowhere, Mode::Create, &plan), Status::Io, &["where"]);
        for contents in [&b""[..], b"x", b"{\"K_pos\": []}", &[0; 9000]] {
            std::fs::write(&path, contents).unwrap();
            for mode in [Mode::Read, Mode::Write, Mode::Create] {
                refused(open(&path, mode, &plan), Status::Format, &["reference.cache"]);
                assert_eq!(std::fs::read(&path).unwrap(), contents, "it was written to");
            }
        }
    }
}

/// The file that ABI.md describes, bit for bit.
mod format {
    use std::collections::BTreeMap;
    use std::io::Read;

    use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
    use sha2::{Digest, Sha256};

    use super::*;

    type Records = BTreeMap<Vec<u8>, Vec<u8>>;

    const TABLES: [&str; 5] = ["meta", "examples", "columns", "groups", "values"];
    const TOKENS: [i64; 3] = [5, 6, 7];
    const POSITIONS: [i64; 3] = [0, 1, 4];
    const IMAGE: &[u8] = b"an image";
    const NOTE: &str = "{\"image\": 60}";
    /// z of the latents 3, 17 and then 1.
    const Z: [[f32; 3]; 3] = [[0.5, 1.0, 4.0], [-2.0, 0.0, 0.0], [3.25, 0.125, 7.0]];

    /// Its z does not matter, and its numerics are those of every machine.
    fn plan(ids: &[i64]) -> Plan {
        let encoder: Vec<f32> = (0..40).map(|i| i as f32 / 8.0).collect();
        let view = Tensor::from_slice(&encoder, &[20, 2]).unwrap();
        let mut tensors = SaeTensors::new(Architecture::Standard, 2, 20, view);
        tensors.encoder_layout = Some(Layout::LatentMajor);
        let bias = [0.25; 20];
        tensors.encoder_bias = Some(Tensor::from_slice(&bias, &[20]).unwrap());
        let set = Latents::new(ids, &vec![1; ids.len()], None).unwrap();
        let options = PlanOptions { backend: BackendKind::Reference, ..PlanOptions::default() };
        Plan::new(&Sae::from_tensors(&tensors).unwrap(), &set, &options).unwrap()
    }

    fn open(path: &Path, mode: Mode) -> Result<Cache> {
        let plan = plan(&[3, 17]);
        Cache::open(
            path,
            &CacheOptions {
                mode,
                base_model: Some("base"),
                layer: Some(1),
                dtype: Some(DType::BF16),
                plan: Some(&plan),
                ..CacheOptions::default()
            },
        )
    }

    /// Two examples of the same tokens, the first of which has a latent more.
    fn write(path: &Path) {
        let cache = open(path, Mode::Create).unwrap();
        cache.put_note("placeholders", NOTE).unwrap();
        let keys = [
            cache.example_key(&TOKENS, None, &[]).unwrap(),
            cache.example_key(&TOKENS, Some(&POSITIONS), IMAGE).unwrap(),
        ];
        let two: Vec<f32> = Z.iter().flat_map(|z| [z[0], z[1]]).collect();
        let two = Tensor::from_slice(&two, &[3, 2]).unwrap();
        assert_eq!(cache.put(&plan(&[3, 17]), &keys, &[two, two]).unwrap(), 4);
        let turned: Vec<f32> = Z.iter().flat_map(|z| [z[1], z[2]]).collect();
        let turned = Tensor::from_slice(&turned, &[3, 2]).unwrap();
        assert_eq!(cache.put(&plan(&[17, 1]), &keys[..1], &[turned]).unwrap(), 1);
    }

    /// What ABI.md says, by other code.
    fn expected() -> Vec<Records> {
        let identity = concat!(
            r#"{"format":2,"base_model":"base","site":"block_output","layer":1,"#,
            r#""dtype":"bfloat16","numerics":"reference-1"}"#
        );
        let mut digest = Sha256::new();
        for text in ["blockem cache 2", "base", "block_output", "bfloat16", "reference-1"] {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text);
        }
        digest.update(1i64.to_le_bytes());
        let file: Key = digest.finalize().into();
        let example = |positions: [i64; 3], context: &[u8]| {
            let mut digest = Sha256::new();
            digest.update(b"blockem example 2");
            digest.update(file);
            digest.update(3u64.to_le_bytes());
            TOKENS.iter().chain(&positions).for_each(|x| digest.update(x.to_le_bytes()));
            let context = match context {
                [] => [0; 32],
                bytes => Sha256::digest([b"blockem context 2", bytes].concat()).into(),
            };
            [&digest.finalize()[..16], &context[..16]].concat()
        };
        let (first, second) = (example([0, 1, 2], &[]), example(POSITIONS, IMAGE));
        let all = plan(&[3, 17, 1]);
        let latents = [0, 1, 2].map(|k| all.column_digest(k));
        let group = |members: &[Key]| Sha256::digest(members.concat()).to_vec();
        let (pair, single) = (group(&latents[..2]), group(&latents[2..]));
        let column = |k: usize| Z.iter().flat_map(|z| z[k].to_le_bytes()).collect::<Vec<u8>>();
        let z_of_pair = [&[1, 0, 0, 0, 2, 0, 0, 0][..], &column(0), &column(1)].concat();
        let z_of_single = [&[1, 0, 0, 0, 1, 0, 0, 0][..], &column(2)].concat();
        let tokens = 3u64.to_le_bytes();
        let tables: [Vec<(Vec<u8>, Vec<u8>)>; 5] = [
            vec![
                (b"identity".to_vec(), identity.as_bytes().to_vec()),
                (b"note placeholders".to_vec(), NOTE.as_bytes().to_vec()),
            ],
            vec![
                (first.clone(), [&tokens[..], &pair, &single].concat()),
                (second.clone(), [&tokens[..], &pair].concat()),
            ],
            latents
                .iter()
                .zip([3u64, 17, 1])
                .map(|(latent, id)| (latent.to_vec(), id.to_le_bytes().to_vec()))
                .collect(),
            vec![
                (pair.clone(), [&[1, 0, 0, 0][..], &latents[..2].concat()].concat()),
                (single.clone(), [&[1, 0, 0, 0][..], &latents[2]].concat()),
            ],
            vec![
                ([&first[..], &pair].concat(), z_of_pair.clone()),
                ([&second[..], &pair].concat(), z_of_pair),
                ([&first[..], &single].concat(), z_of_single),
            ],
        ];
        let seal = |(key, value): (Vec<u8>, Vec<u8>)| {
            let sealed = sealed(&key, &value);
            (key, sealed)
        };
        tables.into_iter().map(|table| table.into_iter().map(seal).collect()).collect()
    }

    fn sealed(key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut crc = flate2::Crc::new();
        crc.update(key);
        crc.update(value);
        [&crc.sum().to_le_bytes(), value].concat()
    }

    fn definition(name: &str) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
        TableDefinition::new(name)
    }

    fn tables(path: &Path) -> Vec<Records> {
        let file = Database::open(path).unwrap();
        let transaction = file.begin_read().unwrap();
        let records = |name| {
            let table = transaction.open_table(definition(name)).unwrap();
            let record = |pair: std::result::Result<_, redb::StorageError>| {
                let (key, value): (redb::AccessGuard<&[u8]>, redb::AccessGuard<&[u8]>) =
                    pair.unwrap();
                (key.value().to_vec(), value.value().to_vec())
            };
            table.iter().unwrap().map(record).collect()
        };
        TABLES.map(records).into()
    }

    /// A file of tests/data/caches.
    fn committed(name: &str, path: &Path) {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/caches").join(name);
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&archive).unwrap();
        flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn is_what_is_described_and_what_was_committed() {
        let (_folder, path) = folder();
        write(&path);
        if std::env::var_os("BLOCKEM_WRITE_CACHE").is_some() {
            let archive =
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/caches/format-2.cache.gz");
            let file = std::fs::File::create(archive).unwrap();
            let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::best());
            encoder.write_all(&std::fs::read(&path).unwrap()).unwrap();
            encoder.finish().unwrap();
        }
        let golden = path.with_extension("golden");
        committed("format-2.cache.gz", &golden);
        for file in [&path, &golden] {
            for (name, (found, wanted)) in TABLES.iter().zip(tables(file).iter().zip(&expected())) {
                assert_eq!(found, wanted, "{name} of {}", file.display());
            }
        }
        let cache = open(&golden, Mode::Read).unwrap();
        assert_eq!(cache.note("placeholders").unwrap().unwrap(), NOTE);
        let key = cache.example_key(&TOKENS, None, &[]).unwrap();
        let mut z = [[f32::NAN; 3]; 3];
        let view = TensorMut::from_slice(z.as_flattened_mut(), &[3, 3]).unwrap();
        cache.get(&plan(&[3, 17, 1]), &[key], &mut [view]).unwrap();
        assert_eq!(z, Z);
    }

    #[test]
    fn of_another_number_is_unsupported_and_stays() {
        let (_folder, path) = folder();
        committed("format-1.cache.gz", &path);
        let before = std::fs::read(&path).unwrap();
        for mode in [Mode::Read, Mode::Write, Mode::Create] {
            let options = CacheOptions { mode, ..CacheOptions::default() };
            let words = ["reference.cache", "format 1", "reads format 2", "make a new file"];
            refused(Cache::open(&path, &options), Status::Unsupported, &words);
        }
        let after = std::fs::read(&path).unwrap();
        assert_eq!(tables_of(before), tables_of(after), "it was changed");
    }

    fn tables_of(bytes: Vec<u8>) -> Vec<Records> {
        let (_folder, path) = folder();
        std::fs::write(&path, bytes).unwrap();
        tables(&path)
    }

    /// Changes every record of a table, and seals it.
    fn change(path: &Path, table: &str, change: impl Fn(&mut Vec<u8>)) {
        let records = tables(path).swap_remove(TABLES.iter().position(|t| *t == table).unwrap());
        let file = Database::open(path).unwrap();
        let transaction = file.begin_write().unwrap();
        for (key, value) in records {
            let mut payload = value[4..].to_vec();
            change(&mut payload);
            let mut table = transaction.open_table(definition(table)).unwrap();
            table.insert(&key[..], &sealed(&key, &payload)[..]).unwrap();
        }
        transaction.commit().unwrap();
    }

    #[test]
    fn of_later_records_is_refused_by_name_and_never_misread() {
        let (_folder, path) = folder();
        type Change = fn(&mut Vec<u8>);
        let cases: [(&str, Change, Status, &str); 12] = [
            ("groups", |r| r[0] = 2, Status::Unsupported, "hidden states"),
            ("groups", |r| r[0] = 3, Status::Unsupported, "keys and values of a prefix"),
            ("groups", |r| r[0] = 9, Status::Unsupported, "kind 9"),
            ("groups", |r| r[2] = 1, Status::Unsupported, "later version"),
            ("groups", |r| r.truncate(3), Status::Format, "no kind"),
            ("groups", |r| r.truncate(4 + 33), Status::Format, "cut short"),
            ("values", |r| r[0] = 2, Status::Unsupported, "hidden states"),
            ("values", |r| r[1] = 2, Status::Unsupported, "bfloat16"),
            ("values", |r| r[3] = 1, Status::Unsupported, "later version"),
            ("values", |r| r[4] = 7, Status::Format, "width"),
            ("values", |r| r.truncate(7), Status::Format, "no header"),
            ("examples", |r| r.truncate(9), Status::Format, "half a group"),
        ];
        for (table, how, status, word) in cases {
            write(&path);
            change(&path, table, how);
            let cache = open(&path, Mode::Write).unwrap();
            let keys = [
                cache.example_key(&TOKENS, None, &[]).unwrap(),
                cache.example_key(&TOKENS, Some(&POSITIONS), IMAGE).unwrap(),
            ];
            let plan = plan(&[3, 17]);
            for key in keys {
                let mut z = [7.0f32; 6];
                let view = TensorMut::from_slice(&mut z, &[3, 2]).unwrap();
                refused(cache.get(&plan, &[key], &mut [view]), status, &[word]);
                assert_eq!(z, [7.0; 6], "{table} with {word}: written to in spite of the error");
            }
            drop(cache);
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn without_an_identity_that_is_whole_is_refused() {
        let (_folder, path) = folder();
        for (text, status, word) in [
            ("{", Status::Format, "not JSON"),
            ("[]", Status::Unsupported, "format null"),
            (r#"{"format": 3}"#, Status::Unsupported, "format 3"),
            (r#"{"format": 2}"#, Status::Format, "lacks"),
            (
                r#"{"format": 2, "base_model": "b", "site": "the moon", "layer": 1,
                    "dtype": "float32", "numerics": "reference-1"}"#,
                Status::Unsupported,
                "the moon",
            ),
        ] {
            write(&path);
            change(&path, "meta", |record| *record = text.as_bytes().to_vec());
            refused(open(&path, Mode::Read), status, &["reference.cache", word]);
            std::fs::remove_file(&path).unwrap();
        }
    }
}

mod processes {
    use super::*;

    #[test]
    fn one_writes_or_many_read() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let writer = open(&path, Mode::Create, &plan).unwrap();
        put(&writer, &plan, &[0]).unwrap();
        for mode in [Mode::Read, Mode::Write, Mode::Create] {
            refused(open(&path, mode, &plan), Status::CacheBusy, &["in use"]);
        }
        let mut other = helper("open_for_writing", &path).spawn().unwrap();
        assert_eq!(other.wait().unwrap().code(), Some(0), "the other process was not refused");
        put(&writer, &plan, &[1]).unwrap();
        drop(writer);

        let readers = [(); 3].map(|()| open(&path, Mode::Read, &plan).unwrap());
        let mut others: Vec<Child> =
            (0..2).map(|_| helper("read_two", &path).spawn().unwrap()).collect();
        for reader in &readers {
            assert_holds(reader, &plan, 0);
            assert_holds(reader, &plan, 1);
            refused(put(reader, &plan, &[2]), Status::InvalidArgument, &["opened for reading"]);
        }
        for other in &mut others {
            assert_eq!(other.wait().unwrap().code(), Some(0), "the other process could not read");
        }
        refused(open(&path, Mode::Write, &plan), Status::CacheBusy, &["in use"]);
        drop(readers);
        put(&open(&path, Mode::Write, &plan).unwrap(), &plan, &[2]).unwrap();
    }

    #[test]
    fn threads_share_a_handle() {
        let (_folder, path) = folder();
        let plan = plan(&[3, 17]);
        let cache = open(&path, Mode::Create, &plan).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (cache, plan) = (&cache, &plan);
                scope.spawn(move || {
                    for i in 0..10 {
                        put(cache, plan, &[thread * 10 + i, i]).unwrap();
                        assert_holds(cache, plan, thread * 10 + i);
                    }
                });
            }
        });
        assert_eq!(cache.counts().unwrap().examples, 40);
    }

    #[test]
    #[ignore = "a process of the tests here"]
    fn open_for_writing() {
        let plan = plan(&[3, 17]);
        refused(open(&helper_path(), Mode::Create, &plan), Status::CacheBusy, &["in use"]);
    }

    #[test]
    #[ignore = "a process of the tests here"]
    fn read_two() {
        let plan = plan(&[3, 17]);
        let cache = open(&helper_path(), Mode::Read, &plan).unwrap();
        assert_holds(&cache, &plan, 0);
        assert_holds(&cache, &plan, 1);
    }
}

mod kills {
    use super::*;

    const KILLS: usize = 100;
    /// Examples of one file; a writer is killed long before it has them all.
    const EXAMPLES: usize = 400;

    /// A writer is killed a hundred times: at random moments from its first instruction on, and
    /// some time after it has acknowledged new examples. After each kill the file opens, for reading
    /// or for writing, all that was acknowledged is there bit for bit, and the next writer goes on
    /// where that one stopped. In the end one may finish. (A unit test of the cache kills in each
    /// write to the file.)
    #[test]
    fn lose_nothing_that_was_acknowledged() {
        let mut rng = Rng::fresh();
        let (folder, mut path) = folder();
        let plan = plan(&[3, 17, 21]);
        let (mut acknowledged, mut files, mut after_new) = (0, 1, 0);
        for kill in 0..KILLS {
            let before = acknowledged;
            // It acknowledges two at a time, those that are there first.
            let (lines, microseconds) = match rng.below(8) {
                0 => (0, rng.below(60_000)),
                n => (before / 2 + n, rng.below(4_000)),
            };
            acknowledged = acknowledged.max(write_until_killed(&path, lines, microseconds as u64));
            assert!(lines == 0 || acknowledged > before, "kill {kill} came before {lines} lines");
            after_new += (acknowledged > before) as usize;
            if path.exists() {
                let mode = if kill % 2 == 0 { Mode::Read } else { Mode::Write };
                let cache = open(&path, mode, &plan)
                    .unwrap_or_else(|e| panic!("kill {kill} as {mode:?}: {e}"));
                check_prefix(&cache, &plan, acknowledged);
            } else {
                assert_eq!(acknowledged, 0);
            }
            if acknowledged > EXAMPLES / 2 {
                path = folder.path().join(format!("{files}.cache"));
                (acknowledged, files) = (0, files + 1);
            }
        }
        println!("{KILLS} kills, {after_new} of them after new examples, {files} files");

        let mut writer = helper("write_examples", &path).spawn().unwrap();
        assert!(writer.wait().unwrap().success(), "the last writer did not finish");
        check_prefix(&open(&path, Mode::Read, &plan).unwrap(), &plan, EXAMPLES);
    }

    /// Kills a writer some microseconds after it has said so many lines; how many examples it had
    /// acknowledged in all.
    fn write_until_killed(path: &Path, lines: usize, microseconds: u64) -> usize {
        let mut writer = helper("write_examples", path).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(writer.stdout.take().unwrap())
            .lines()
            .map_while(std::result::Result::ok)
            .filter_map(|line| line.strip_prefix("done ")?.parse::<usize>().ok());
        let waited_for = said.by_ref().take(lines).last();
        std::thread::sleep(Duration::from_micros(microseconds));
        writer.kill().unwrap();
        let status = writer.wait().unwrap();
        // One that was faster than the kill has written them all.
        assert!(status.success() || status.code().is_none(), "the writer failed by itself");
        said.last().or(waited_for).map_or(0, |last| last + 1)
    }

    /// The first `count` examples are complete; of later ones, what is there is right.
    fn check_prefix(cache: &Cache, plan: &Plan, count: usize) {
        for i in 0..count {
            assert_holds(cache, plan, i);
        }
        for i in count..EXAMPLES {
            if !cache.missing(plan, &[key(cache, i)]).unwrap().contains(&true) {
                assert_holds(cache, plan, i);
            }
        }
    }

    #[test]
    #[ignore = "a process of the tests here"]
    fn write_examples() {
        let plan = plan(&[3, 17, 21]);
        let cache = open(&helper_path(), Mode::Create, &plan).unwrap();
        for i in (0..EXAMPLES).step_by(2) {
            let keys = [key(&cache, i), key(&cache, i + 1)];
            if cache.missing(&plan, &keys).unwrap().contains(&true) {
                put(&cache, &plan, &[i, i + 1]).unwrap();
            }
            // Past the harness's capture, which would keep it until the end.
            let line = format!("done {}\n", i + 1);
            std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
        }
    }
}

mod damage {
    use super::*;

    /// A closed cache, and one whose writer was killed, as bytes.
    fn files(plan: &Plan) -> [Vec<u8>; 2] {
        quiet_panics_of_the_store();
        let (_folder, path) = folder();
        let cache = open(&path, Mode::Create, plan).unwrap();
        put(&cache, plan, &(0..EXAMPLES).collect::<Vec<_>>()).unwrap();
        let open_file = std::fs::read(&path).unwrap();
        drop(cache);
        [std::fs::read(&path).unwrap(), open_file]
    }

    const EXAMPLES: usize = 40;

    /// Opens and reads everything: each answer is the right bits or a named error. How many answers
    /// were errors.
    fn read_all(path: &Path, mode: Mode, plan: &Plan, what: &str) -> usize {
        let fine = |status| {
            use Status::*;
            matches!(status, Format | Io | CacheMiss | CacheStale)
        };
        let cache = match open(path, mode, plan) {
            Ok(cache) => cache,
            Err(e) => {
                assert!(fine(e.status), "{what}: {:?} {e}", e.status);
                assert!(e.message.contains("damaged.cache"), "{what}: {e}");
                return EXAMPLES;
            }
        };
        let mut failures = 0;
        for i in 0..EXAMPLES {
            match get(&cache, plan, i) {
                Ok(z) => assert!(same_bits(&z, &encode(plan, &example(i).1)), "{what}: wrong bits"),
                Err(e) => {
                    assert!(fine(e.status), "{what}: {:?} {e}", e.status);
                    failures += 1;
                }
            }
        }
        if mode == Mode::Write {
            match put(&cache, plan, &[EXAMPLES]) {
                Ok(_) => assert!(get(&cache, plan, EXAMPLES).is_ok(), "{what}: put, not there"),
                Err(e) => assert!(fine(e.status), "{what}: {:?} {e}", e.status),
            }
        }
        failures
    }

    /// Panics that the cache catches would fill the screen.
    fn quiet_panics_of_the_store() {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let loud = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if !panic.location().is_some_and(|at| at.file().contains("/redb-")) {
                    loud(panic);
                }
            }));
        });
    }

    #[test]
    fn a_truncated_file_is_told() {
        let plan = plan(&[3, 17, 21]);
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("damaged.cache");
        let mut rng = Rng::fresh();
        for (file, kind) in files(&plan).iter().zip(["closed", "killed"]) {
            let ends = (0..60).map(|_| rng.below(file.len()));
            let edges = [0, 1, 9, 320, 4095, 4096, 4097, 8192, file.len() - 1, file.len() - 4096];
            for end in edges.into_iter().chain(ends) {
                for mode in [Mode::Read, Mode::Write] {
                    std::fs::write(&path, &file[..end]).unwrap();
                    let failures =
                        read_all(&path, mode, &plan, &format!("{kind} file cut to {end}"));
                    assert!(
                        failures > 0 || end > file.len() / 2,
                        "nothing of a {kind} file cut to {end} of {} bytes was missed",
                        file.len()
                    );
                }
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_told_or_does_not_matter() {
        let plan = plan(&[3, 17, 21]);
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("damaged.cache");
        let mut rng = Rng::fresh();
        let (mut told, mut harmless) = (0, 0);
        for (file, kind) in files(&plan).iter().zip(["closed", "killed"]) {
            // Zeros are mostly free pages.
            let used: Vec<usize> = (0..file.len()).filter(|at| file[*at] != 0).collect();
            let mut places: Vec<(usize, usize)> = (0..320).map(|at| (at, rng.below(8))).collect();
            places.extend((0..300).map(|_| (used[rng.below(used.len())], rng.below(8))));
            for (at, bit) in places {
                let mode = [Mode::Read, Mode::Write][rng.below(2)];
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                std::fs::write(&path, &damaged).unwrap();
                let what = format!("{kind} file, bit {bit} of byte {at}, {mode:?}");
                let failures = read_all(&path, mode, &plan, &what);
                if failures > 0 { told += 1 } else { harmless += 1 }
            }
        }
        println!("{told} flips told, {harmless} without effect");
        assert!(told > 150, "only {told} flips had an effect");
    }

    #[test]
    fn zeroed_and_foreign_pages_are_told() {
        let plan = plan(&[3, 17, 21]);
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("damaged.cache");
        let mut rng = Rng::fresh();
        for file in files(&plan) {
            let pages = file.len() / 4096;
            for _ in 0..60 {
                let mut damaged = file.clone();
                let (at, from) = (rng.below(pages) * 4096, rng.below(pages) * 4096);
                if rng.below(2) == 0 {
                    damaged[at..at + 4096].fill(0);
                } else {
                    damaged.copy_within(from..from + 4096, at);
                }
                for mode in [Mode::Read, Mode::Write] {
                    std::fs::write(&path, &damaged).unwrap();
                    read_all(&path, mode, &plan, &format!("page at {at} replaced by {from}"));
                }
            }
        }
    }
}

mod full_disk {
    use super::*;

    /// A process that may write files of so many bytes fills a cache until the disk is full.
    #[test]
    fn is_an_error_and_keeps_what_was_there() {
        let mut rng = Rng::fresh();
        let plan = plan(&[3, 17, 21]);
        let mut stored = Vec::new();
        for _ in 0..8 {
            let (_folder, path) = folder();
            let limit = 4096 * (1 + rng.below(700) as u64);
            let output = helper("fill_a_disk", &path)
                .env("BLOCKEM_TEST_LIMIT", limit.to_string())
                .stdout(Stdio::piped())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "limit {limit}: {said}");
            let count = said.lines().filter(|line| line.starts_with("stored ")).count();
            stored.push(count);
            if count == 0 {
                continue;
            }
            for mode in [Mode::Read, Mode::Write] {
                let cache = open(&path, mode, &plan).unwrap();
                for i in 0..count {
                    assert_holds(&cache, &plan, i);
                }
                if mode == Mode::Write {
                    put(&cache, &plan, &[count, count + 1]).unwrap();
                    assert_holds(&cache, &plan, count + 1);
                }
            }
        }
        println!("examples stored before the disk was full: {stored:?}");
        assert!(stored.iter().any(|count| *count > 10), "no limit let any be stored");
    }

    #[test]
    #[ignore = "a process of the tests here"]
    fn fill_a_disk() {
        let bytes = std::env::var("BLOCKEM_TEST_LIMIT").unwrap().parse().unwrap();
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: this process only; without the signal a write past the limit answers EFBIG.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        }
        let plan = plan(&[3, 17, 21]);
        let path = helper_path();
        let cache = match open(&path, Mode::Create, &plan) {
            Ok(cache) => cache,
            Err(e) => {
                assert_eq!(e.status, Status::Io, "{e}");
                assert!(!path.exists(), "half a file has the name");
                return;
            }
        };
        // Many at a time: each call waits for the disk.
        for i in (0..).step_by(16) {
            let batch: Vec<usize> = (i..i + 16).collect();
            match put(&cache, &plan, &batch) {
                Ok(_) => batch.iter().for_each(|i| println!("stored {i}")),
                Err(e) => {
                    assert_eq!(e.status, Status::Io, "{e}");
                    refused(put(&cache, &plan, &batch), Status::Io, &["reference.cache"]);
                    break;
                }
            }
        }
    }
}

/// This program again, running one of its ignored tests on a file.
fn helper(test: &str, path: &Path) -> Command {
    let module = match test {
        "write_examples" => "kills",
        "fill_a_disk" => "full_disk",
        _ => "processes",
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("{module}::{test}"), "--ignored", "--nocapture"]);
    command.env("BLOCKEM_TEST_CACHE", path).stdout(Stdio::null()).stderr(Stdio::inherit());
    command
}

fn helper_path() -> PathBuf {
    std::env::var_os("BLOCKEM_TEST_CACHE").unwrap().into()
}
