//! A disk that is full from the n-th write on, for each n.

use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

use super::*;
use crate::latents::Latents;
use crate::plan::PlanOptions;
use crate::sae::{Architecture, Layout, Sae, SaeTensors};

const LATENTS: usize = 3;
const EXAMPLES: u64 = 12;

#[test]
fn a_full_disk_is_an_error_at_every_write() {
    let folder = tempfile::tempdir().unwrap();
    let (original, path) = (folder.path().join("original"), folder.path().join("reference.cache"));
    let plan = plan();
    let options = CacheOptions {
        mode: Mode::Create,
        base_model: Some("base"),
        layer: Some(0),
        dtype: Some(DType::F32),
        plan: Some(&plan),
    };
    put(&Cache::open(&original, &options).unwrap(), &plan, 0).unwrap();
    let mut failed = 0;
    for writes in 0.. {
        std::fs::copy(&original, &path).unwrap();
        let (stored, full) = put_until_full(&path, &plan, writes);
        failed += full as usize;
        for mode in [Mode::Read, Mode::Write] {
            let cache = Cache::open(&path, &CacheOptions { mode, ..options })
                .unwrap_or_else(|e| panic!("{mode:?} after {writes} writes: {e}"));
            for i in 0..stored {
                assert_holds(&cache, &plan, i, writes);
            }
            if mode == Mode::Write {
                put(&cache, &plan, stored).unwrap();
                assert_holds(&cache, &plan, stored, writes);
            }
        }
        if !full {
            break;
        }
    }
    assert!(failed > 20, "only {failed} places to fail");
}

/// How many examples were stored, and whether the disk was full then. The write that fails leaves
/// half of its bytes.
fn put_until_full(path: &Path, plan: &Plan, writes: u64) -> (u64, bool) {
    let left = Arc::new(AtomicU64::new(u64::MAX));
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let disk = Disk { file: FileBackend::new(file).unwrap(), left: left.clone() };
    let cache = Cache::of(Store::on(path, disk)).unwrap();
    left.store(writes, Ordering::SeqCst);
    for i in 1..EXAMPLES {
        if let Err(e) = put(&cache, plan, i) {
            assert_eq!(e.status, Status::Io, "{e}");
            assert!(e.message.contains("reference.cache"), "{e}");
            let again = put(&cache, plan, i).unwrap_err();
            assert_eq!(again.status, Status::Io, "{again}");
            return (i, true);
        }
    }
    (EXAMPLES, false)
}

/// Writes so many times, then is full.
#[derive(Debug)]
struct Disk {
    file: FileBackend,
    left: Arc<AtomicU64>,
}

impl StorageBackend for Disk {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
            return self.file.write(offset, data);
        }
        self.file.write(offset, &data[..data.len() / 2])?;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}

fn plan() -> Plan {
    let encoder = [0.5f32; 2 * LATENTS];
    let bias = [0.0; LATENTS];
    let view = Tensor::from_slice(&encoder, &[LATENTS, 2]).unwrap();
    let mut tensors = SaeTensors::new(Architecture::Standard, 2, LATENTS, view);
    tensors.encoder_layout = Some(Layout::LatentMajor);
    tensors.encoder_bias = Some(Tensor::from_slice(&bias, &[LATENTS]).unwrap());
    let latents = Latents::new(&[0, 1, 2], &[1; LATENTS], None).unwrap();
    Plan::new(&Sae::from_tensors(&tensors).unwrap(), &latents, &PlanOptions::default()).unwrap()
}

/// z of example i.
fn latents(i: u64) -> Vec<f32> {
    (0..(40 + 7 * i as usize) * LATENTS).map(|n| i as f32 + n as f32 / 64.0).collect()
}

fn put(cache: &Cache, plan: &Plan, i: u64) -> crate::error::Result<u64> {
    let z = latents(i);
    let view = Tensor::from_slice(&z, &[z.len() / LATENTS, LATENTS]).unwrap();
    cache.put(plan, &[[i as u8; 32]], &[view])
}

fn assert_holds(cache: &Cache, plan: &Plan, i: u64, writes: u64) {
    let expected = latents(i);
    let mut z = vec![-1.0f32; expected.len()];
    let view = TensorMut::from_slice(&mut z, &[expected.len() / LATENTS, LATENTS]).unwrap();
    cache
        .get(plan, &[[i as u8; 32]], &mut [view])
        .unwrap_or_else(|e| panic!("example {i} after {writes} writes: {e}"));
    assert_eq!(z, expected, "example {i} after {writes} writes");
}
