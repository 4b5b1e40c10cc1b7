//! Records of a reference cache. The file under them is redb's and sound.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use blockem::cache::{Cache, CacheOptions, Key, Mode};
use blockem::error::Result;
use blockem::latents::Latents;
use blockem::plan::{BackendKind, Plan, PlanOptions};
use blockem::sae::{Architecture, Layout, Sae, SaeTensors};
use blockem::tensor::{DType, Tensor, TensorMut};
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

use crate::bounds::bounded;
use crate::targets::Place;

/// A record of a reference cache: a byte for its table, one for its place there, and what it holds.
/// It is sealed like a sound one, so that what lies in it is read.
pub fn cache(bytes: &[u8]) {
    let Some((&[table, at], record)) = bytes.split_first_chunk() else { return };
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    let sound = SOUND.get_or_init(valid);
    let place = Place::new();
    let path = place.put("reference.cache", sound);
    replace_record(&path, TABLES[table as usize % TABLES.len()], at, record);
    bounded(bytes.len() + sound.len(), || {
        for mode in [Mode::Read, Mode::Write] {
            no_panic(use_cache(&path, mode));
        }
    });
}

/// What panics below a cache is caught there, and is a fault all the same.
fn no_panic<T>(outcome: Result<T>) {
    if let Err(e) = outcome {
        assert!(!e.message.contains("its tables cannot be followed"), "a panic: {e}");
    }
}

const TABLES: [&str; 5] = ["meta", "examples", "columns", "groups", "values"];

/// Two examples of three tokens, one of two groups, and a note.
fn valid() -> Vec<u8> {
    let place = Place::new();
    let path = place.folder().join("reference.cache");
    let plan = small_plan(&[1, 5]);
    let options = CacheOptions {
        mode: Mode::Create,
        base_model: Some("base"),
        layer: Some(1),
        dtype: Some(DType::F32),
        plan: Some(&plan),
        ..CacheOptions::default()
    };
    let cache = Cache::open(&path, &options).expect("cannot make a cache");
    let (z, keys) = ([0.5f32; 6], keys(&cache));
    let z = Tensor::from_slice(&z, &[3, 2]).expect("six elements");
    cache.put_note("placeholders", "{}").expect("cannot keep a note");
    cache.put(&plan, &keys, &[z, z]).expect("cannot put z");
    cache.put(&small_plan(&[5, 6]), &keys[..1], &[z]).expect("cannot put z");
    drop(cache);
    fs::read(path).expect("the cache is lost")
}

fn keys(cache: &Cache) -> [Key; 2] {
    [&b""[..], b"an image"].map(|c| cache.example_key(&[5, 6, 7], None, c).expect("three tokens"))
}

fn small_plan(ids: &[i64]) -> Plan {
    let (encoder, bias) = ([0.25f32; 16], [0.0f32; 8]);
    let view = Tensor::from_slice(&encoder, &[8, 2]).expect("sixteen elements");
    let mut tensors = SaeTensors::new(Architecture::Standard, 2, 8, view);
    tensors.encoder_layout = Some(Layout::LatentMajor);
    tensors.encoder_bias = Some(Tensor::from_slice(&bias, &[8]).expect("eight elements"));
    let set = Latents::new(ids, &vec![1; ids.len()], None).expect("a set");
    let sae = Sae::from_tensors(&tensors).expect("an SAE");
    let options = PlanOptions { backend: BackendKind::Reference, ..PlanOptions::default() };
    Plan::new(&sae, &set, &options).expect("a plan")
}

fn replace_record(path: &Path, table: &str, at: u8, record: &[u8]) {
    let name = TableDefinition::<&[u8], &[u8]>::new(table);
    let file = Database::open(path).expect("a sound file");
    let transaction = file.begin_write().expect("a sound file");
    {
        let mut table = transaction.open_table(name).expect("a sound file");
        let count = table.len().expect("a sound file") as usize;
        let found = table.iter().expect("a sound file").nth(at as usize % count);
        let key = found.expect("a record").expect("a sound file").0.value().to_vec();
        let mut crc = flate2::Crc::new();
        crc.update(&key);
        crc.update(record);
        let sealed = [&crc.sum().to_le_bytes(), record].concat();
        table.insert(key.as_slice(), sealed.as_slice()).expect("a sound file");
    }
    transaction.commit().expect("a sound file");
}

fn use_cache(path: &Path, mode: Mode) -> Result<()> {
    let cache = Cache::open(path, &CacheOptions { mode, ..CacheOptions::default() })?;
    let (keys, plans) = (keys(&cache), [[1i64, 5], [5, 6], [7, 6]].map(|ids| small_plan(&ids)));
    cache.counts()?;
    no_panic(cache.note("placeholders"));
    for key in keys {
        for plan in &plans {
            let mut z = [0.0f32; 6];
            let view = TensorMut::from_slice(&mut z, &[3, 2])?;
            no_panic(cache.missing(plan, &[key]));
            no_panic(cache.get(plan, &[key], &mut [view]));
            no_panic(cache.put(plan, &[key], &[Tensor::from_slice(&z, &[3, 2])?]));
        }
    }
    Ok(())
}

/// Inputs to start from: every record of a sound file, as it is and a little changed.
pub fn seeds() -> Vec<Vec<u8>> {
    let place = Place::new();
    let file = Database::open(place.put("reference.cache", &valid())).expect("a sound file");
    let transaction = file.begin_read().expect("a sound file");
    let mut seeds = Vec::new();
    for (t, name) in TABLES.iter().enumerate() {
        let name = TableDefinition::<&[u8], &[u8]>::new(name);
        let table = transaction.open_table(name).expect("a sound file");
        for (at, record) in table.iter().expect("a sound file").enumerate() {
            let sealed = record.expect("a sound file").1.value().to_vec();
            let seed = [&[t as u8, at as u8], &sealed[4..]].concat();
            let longer = [&seed[..], &sealed[4..]].concat();
            seeds.extend([
                seed.clone(),
                seed[..seed.len() - 1].to_vec(),
                longer,
                seed[..2].to_vec(),
            ]);
            for byte in 2..seed.len().min(10) {
                let mut changed = seed.clone();
                changed[byte] += 2;
                seeds.push(changed);
            }
        }
    }
    seeds
}
