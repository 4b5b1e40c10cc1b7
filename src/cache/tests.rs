//! A disk that is full from the n-th write on, and a process that is killed in its n-th write, for
//! each n.

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
    let plan = plan();
    let folder = tempfile::tempdir().unwrap();
    let (original, path) = (folder.path().join("original"), folder.path().join("reference.cache"));
    let cache = Cache::open(&original, &options(Mode::Create, &plan)).unwrap();
    put(&cache, &plan, 0).unwrap();
    drop(cache);
    let mut failed = 0;
    for writes in 0.. {
        std::fs::copy(&original, &path).unwrap();
        let (stored, full) = put_until_full(&path, &plan, writes);
        failed += full as usize;
        assert_goes_on(&path, &plan, stored, writes);
        if !full {
            break;
        }
    }
    assert!(failed > 20, "only {failed} places to fail");
}

/// What was stored is there for readers and writers, and the next one is stored.
fn assert_goes_on(path: &Path, plan: &Plan, stored: u64, writes: u64) {
    for mode in [Mode::Read, Mode::Write] {
        let cache = Cache::open(path, &options(mode, plan))
            .unwrap_or_else(|e| panic!("{mode:?} after {writes} writes: {e}"));
        for i in 0..stored {
            assert_holds(&cache, plan, i, writes);
        }
        if mode == Mode::Write {
            put(&cache, plan, stored).unwrap();
            assert_holds(&cache, plan, stored, writes);
        }
    }
}

fn options(mode: Mode, plan: &Plan) -> CacheOptions<'_> {
    CacheOptions {
        mode,
        base_model: Some("base"),
        layer: Some(0),
        dtype: Some(DType::F32),
        plan: Some(plan),
        ..CacheOptions::default()
    }
}

/// The kill comes in the middle of a write to the file, of which there are a few in every put.
#[test]
#[cfg(unix)]
fn a_kill_in_any_write_loses_nothing_that_was_acknowledged() {
    use std::os::unix::process::ExitStatusExt;

    const KILLED_EXAMPLES: u64 = 4;
    let plan = plan();
    let folder = tempfile::tempdir().unwrap();
    let (original, path) = (folder.path().join("original"), folder.path().join("reference.cache"));
    drop(Cache::open(&original, &options(Mode::Create, &plan)).unwrap());
    let (mut kills, mut before_the_last) = (0, 0);
    for writes in 0.. {
        std::fs::copy(&original, &path).unwrap();
        let writer = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cache::tests::killed_in_a_write", "--ignored", "--nocapture"])
            .env("BLOCKEM_TEST_CACHE", &path)
            .env("BLOCKEM_TEST_WRITES", format!("{writes} {KILLED_EXAMPLES}"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&writer.stdout);
        let stored = said.lines().filter(|line| line.starts_with("stored ")).count() as u64;
        assert_goes_on(&path, &plan, stored, writes);
        if writer.status.success() {
            assert_eq!(stored, KILLED_EXAMPLES);
            break;
        }
        assert_eq!(writer.status.signal(), Some(libc::SIGKILL), "{writes} writes: {said}");
        kills += 1;
        before_the_last += (stored < KILLED_EXAMPLES) as usize;
    }
    // Those after the last put are in the close.
    assert!(before_the_last > 10, "only {before_the_last} of {kills} kills were in a put");
}

#[test]
#[cfg(unix)]
#[ignore = "a process of the test above"]
fn killed_in_a_write() {
    let path = std::env::var_os("BLOCKEM_TEST_CACHE").unwrap();
    let numbers = std::env::var("BLOCKEM_TEST_WRITES").unwrap();
    let (writes, examples) = numbers.split_once(' ').unwrap();
    let (path, plan) = (Path::new(&path), plan());
    let (cache, left) = open_on_a_disk(path, || {
        // SAFETY: ends this process and nothing else.
        unsafe { libc::raise(libc::SIGKILL) };
    });
    left.store(writes.parse().unwrap(), Ordering::SeqCst);
    for i in 0..examples.parse().unwrap() {
        put(&cache, &plan, i).unwrap();
        println!("stored {i}");
    }
}

/// How many examples were stored, and whether the disk was full then. The write that fails leaves
/// half of its bytes.
fn put_until_full(path: &Path, plan: &Plan, writes: u64) -> (u64, bool) {
    let (cache, left) = open_on_a_disk(path, || {});
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

/// A cache on a disk, and how many writes the disk takes before it is full.
fn open_on_a_disk(path: &Path, on_full: fn()) -> (Cache, Arc<AtomicU64>) {
    let left = Arc::new(AtomicU64::new(u64::MAX));
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let disk = Disk { file: FileBackend::new(file).unwrap(), left: left.clone(), on_full };
    (Cache::of(Store::on(path, disk)).unwrap(), left)
}

/// Writes so many times, then is full.
#[derive(Debug)]
struct Disk {
    file: FileBackend,
    left: Arc<AtomicU64>,
    /// Called when half of the write that fails is in the file.
    on_full: fn(),
}

impl StorageBackend for Disk {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
            return self.file.write(offset, data);
        }
        self.file.write(offset, &data[..data.len() / 2])?;
        (self.on_full)();
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
